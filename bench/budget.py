"""Time that may be spent, where a machine is at hand for minutes only."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(Exception):
    """A rival that the budget had no time for; its row says so."""


class Budget:
    """Seconds from now; None is as long as it takes."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def half(self) -> "Budget":
        """For what must leave as much to what comes after it."""
        return Budget(None if self.seconds is None else max(self.left, 0) / 2)

    def ask(self, seconds: float = 0.0) -> None:
        """OutOfTime where no more than this is left."""
        if self.left <= seconds:
            raise OutOfTime(f"no time left of the {self.seconds:.0f} s for this op")

    @contextmanager
    def half_of_what_is_left(self) -> Iterator[None]:
        """Ends what runs inside, a compilation say, before it costs all others their turn.

        It ends at the next line of Python; outside the main thread it does not.
        """
        limit = self.left / 2
        if limit == float("inf") or threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(signum, frame):
            raise OutOfTime(f"took over {limit:.0f} s, half of what was left of {self.seconds:.0f}")

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(limit, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
