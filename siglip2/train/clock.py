"""How long steps take, and how much of it is waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Training time over all of a run's lives, and the share of it spent waiting for data."""

    def __init__(self, before_s: float):
        self.before_s = before_s  # of earlier lives
        self.start = self.lap_start = time.perf_counter()
        self.num_steps = self.lap_steps = 0
        self.data_s = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.data_s += time.perf_counter() - start

    def total_s(self) -> float:
        return self.before_s + time.perf_counter() - self.start

    def eta_s(self, steps_left: int) -> float:
        return steps_left * (time.perf_counter() - self.start) / max(self.num_steps, 1)

    def step_s(self) -> float:
        return (time.perf_counter() - self.lap_start) / max(self.num_steps - self.lap_steps, 1)

    def data_pct(self) -> float:
        return 100 * self.data_s / max(time.perf_counter() - self.lap_start, 1e-9)

    def lap(self) -> None:
        self.lap_start, self.lap_steps, self.data_s = time.perf_counter(), self.num_steps, 0.0
