"""Room for Python's frames, so that a model's layers do not pay for the depth of their caller.

CPython keeps the frames of a thread in chunks of 16 KiB. A call that crosses the end of one maps
another, its return unmaps it: some 25 us with the page faults. Where a loop stands just before
the end, as the one over a model's layers may, each of its calls pays, and a frame more or less in
the callers decides. On the reference machine (2 cores, 30 layers) that was 60 chunks a step for
plain vLLM and 180 for stairs, whose runner is a call deeper: 3 to 4 ms of 30.

Retired by: CPython that keeps an emptied chunk, https://github.com/python/cpython/issues/142183
(merged 2026-03 for 3.13 and later).
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SLOTS = 8192
"""Pointers in the frame that asks for room; 64 KiB, and as much again is left for its callees."""


def with_room(function: Callable[P, T]) -> Callable[P, T]:
    """Let ``function`` and all that it calls run in one large chunk of frames.

    A frame that does not fit into a chunk gets one of the next power of two above its size and a
    reserve. So the wrapper has a frame of :data:`SLOTS` pointers; memory that nothing touches.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=SLOTS)
    return functools.wraps(function)(call)
