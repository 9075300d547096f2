"""Progress on stderr, for runs that last."""

import sys
import time

QUIET_S = 2.0  # nothing is said in the first seconds, nor more often than this


class Progress:
    """Call it with what is being done; a terminal gets one line that is overwritten."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._width = 0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last < QUIET_S:
            return
        self._last = now
        if self._on_terminal:
            print(f"\r{text:{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._width:
            print(f"\r{'':{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0
