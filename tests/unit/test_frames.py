"""Calls deep in the stack map no memory."""

import resource

from vllm_stairs.engine.frames import with_room

CALLS = 64


def leaf(a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0) -> object:
    """Something to call, with a frame larger than its caller's: it is what does not fit."""
    return [[a, b, c, [d, e, [f, a, [b, c, [d, e, [f, a, [b, c, [d, e, f]]]]]]]]]


def page_faults_at(depth: int) -> int:
    if depth:
        return page_faults_at(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_loop_maps_no_frames_whatever_its_depth() -> None:
    """Bare, CPython 3.11 faults at every call at some depths."""
    worst = max(with_room(page_faults_at)(depth) for depth in range(400))
    assert worst < CALLS // 2


def test_it_calls_as_the_function_does() -> None:
    def both(first: int, *, second: int = 2) -> tuple[int, int]:
        """Text."""
        return first, second

    roomy = with_room(both)
    assert roomy(1) == (1, 2)
    assert roomy(first=3, second=4) == (3, 4)
    assert (roomy.__name__, roomy.__doc__) == ("both", "Text.")
