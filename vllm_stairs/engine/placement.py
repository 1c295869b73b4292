"""Where the draft lives under tensor parallelism (``stairs_placement``).

``colocated``: sharded as the target is. ``replicated``: whole on every rank, without
communication. A process has one tensor parallel group in vLLM, and layers ask it for their shard
when they are made, some also when they run. So the draft of a rank is loaded and run while a group
of this rank alone stands in that place.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

from vllm.distributed import parallel_state

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextlib.contextmanager
def solo_group() -> Iterator[None]:
    """Let this rank be alone in its tensor parallel group.

    Swapped: ``parallel_state._TP``, which ``get_tp_group`` and all that is built on it read, for
    the pipeline group: stairs refuses pipeline parallelism, so it holds this rank and no other.
    Retired by: vLLM running a draft at a ``draft_tensor_parallel_size`` of its own.
    """
    solo = parallel_state.get_pp_group()
    assert solo.world_size == 1
    shared = parallel_state._TP
    parallel_state._TP = solo
    try:
        yield
    finally:
        parallel_state._TP = shared


def in_draft_group(
    method: Callable[Concatenate[Any, _P], _R],
) -> Callable[Concatenate[Any, _P], _R]:
    """Run a method of the proposer in the tensor parallel group of its draft.

    Args:
        method: of an object with an attribute ``replicated``, bool.
    """

    @functools.wraps(method)
    def run(proposer: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with solo_group() if proposer.replicated else contextlib.nullcontext():
            return method(proposer, *args, **kwargs)

    return run
