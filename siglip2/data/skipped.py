"""Examples that could not be used: counted by reason, said now and then."""

import logging
from collections import Counter
from collections.abc import Iterable

from siglip2.data.types import BadSampleError

_log = logging.getLogger("siglip2")
_SAY_EVERY = 1000


class Skipped:
    """Counts by reason; a log line for the first and every thousandth."""

    def __init__(self, source: str):
        self.source = source
        self.counts: Counter[str] = Counter()

    def add(self, errors: Iterable[BadSampleError]) -> None:
        for error in errors:
            self.counts[error.reason] += 1
            total = self.counts.total()
            if total == 1 or total % _SAY_EVERY == 0:
                _log.warning("%s: skipped %d bad examples; last: %s", self.source, total, error)
