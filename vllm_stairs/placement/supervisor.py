"""Keeps a draft running: starts it, and starts another when it is lost, later after each failure.

All that may take long (starting, waiting, ending) is done by a thread of its own. The engine only
looks whether a draft is there.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from vllm_stairs.placement.patience import BackOff

logger = logging.getLogger("vllm.stairs.placement")

T = TypeVar("T")


class Supervisor(Generic[T]):
    """Looks after one draft at a time.

    Args:
        start: begins to start a draft.
        wait: waits until it can be asked; returns what is to be known of it.
        end: ends a draft, in whatever state it is. Must not raise.
        back_off: how long to wait after a failure.

    Attributes:
        draft: to be asked; None while there is none.
        facts: what is to be known of it; None while there is none.
    """

    def __init__(
        self,
        start: Callable[[], T],
        wait: Callable[[T], dict[str, Any]],
        end: Callable[[T], None],
        back_off: BackOff | None = None,
    ) -> None:
        self._start, self._wait, self._end = start, wait, end
        self._back_off = back_off or BackOff()
        self._first: Future[dict[str, Any]] = Future()
        self._wake = threading.Event()
        self._closing = False
        # Started, and not known to be ready.
        self._starting: T | None = None
        self._thread = threading.Thread(target=self._run, name="stairs-draft", daemon=True)
        self.draft: T | None = None
        self.facts: dict[str, Any] | None = None

    def begin(self) -> None:
        """Start the first draft; returns at once."""
        self._thread.start()

    def first(self, timeout: float) -> dict[str, Any]:
        """Wait for the first draft.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: it is not ready by then.
            Exception: it could not be started; it is not tried again.
        """
        return self._first.result(timeout)

    def answered(self) -> None:
        """The draft has answered a question."""
        self._back_off.answered()

    def lost(self, why: str) -> None:
        """The draft is of no use any more: replace it."""
        if self.draft is not None:
            logger.warning("Stairs: the draft is lost, decoding goes on without it: %s", why)
            self.draft = None
            self._wake.set()

    def close(self, timeout: float = 10.0) -> None:
        """End the draft, and start no other.

        Args:
            timeout: seconds to wait for that.
        """
        self._closing = True
        self.draft = None
        self._wake.set()
        if (starting := self._starting) is not None:
            self._end(starting)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._closing:
            draft = None
            try:
                draft = self._starting = self._start()
                facts = self._wait(draft)
                self._starting = None
                self._wake.clear()
                if not self._first.done():
                    self._first.set_result(facts)
                else:
                    logger.warning("Stairs: the draft is back.")
                if not self._closing:
                    self.draft, self.facts = draft, facts
                    self._wake.wait()
            except Exception as error:
                if not self._first.done():
                    self._first.set_exception(error)
                    return
                if not self._closing:
                    logger.warning("Stairs: the draft could not be started again: %s", error)
            finally:
                self.draft = self.facts = self._starting = None
                if draft is not None:
                    self._end(draft)
            self._wake.clear()  # Before looking: whoever closes sets it after.
            if not self._closing:
                self._wake.wait(self._back_off.failed())
