"""Time and peak memory of one call: medians, L2-cold, launch gaps hidden, rivals taking turns.

Why each step is there: bench/README.md.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .budget import Budget

# Larger than the L2 cache of any GPU in machine.PEAKS (H100 50 MB, B200 126 MB).
L2_FLUSH_BYTES = 256 << 20
# Upper bound of SM clocks: a sleep of this many cycles lasts a second or more.
CYCLES_PER_S = 2.1e9
ROUNDS = 5
WARMUP_CALLS = 3
WARMUP_S = 0.5  # once two calls have taken this long, that is enough
MAX_REPS, MIN_REPS = 100, 5
SECONDS_PER_RIVAL = 1.0

Call = Callable[[], object]
Prepare = Callable[
    [], AbstractContextManager[Call]
]  # sets up what the timed call needs, frees it after


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds (or MiB) of one call."""

    p20: float
    p50: float
    p80: float


class Memory(NamedTuple):
    """CUDA memory of one call, beyond what was allocated before it."""

    peak_mib: float
    returned_mib: float  # of the tensors it returned, part of the peak where they existed by then


@dataclass
class Samples:
    """What one rival's rounds gave: times, or the error that ended them."""

    times_ms: list[float] = field(default_factory=list)
    memory: Memory | None = None
    reps_per_round: int = 0
    rounds_s: float = 0.0  # that all rounds will take
    lead_cycles: int = 0
    error: Exception | None = None


def quantiles(values: list[float]) -> Quantiles:
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Quantiles(float(p20), float(p50), float(p80))


def cpu_times(call: Call, reps: int) -> list[float]:
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def cuda_times(call: Call, reps: int, *, lead_cycles: int) -> list[float]:
    """`lead_cycles`: how long the GPU is kept busy before a call, while the host enqueues it."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(reps)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        torch.cuda._sleep(lead_cycles)
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [s.elapsed_time(e) for s, e in zip(starts, ends, strict=True)]


def memory_of(call: Call) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    tensors = result if isinstance(result, tuple | list) else (result,)
    storages = (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor))
    returned = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return Memory(peak / 2**20, sum(returned.values()) / 2**20)


def time_rivals(
    prepares: Mapping[str, Prepare],
    *,
    device: str,
    reps: int | None = None,  # None: as many as fit `seconds`, 5 to 100
    seconds: float = SECONDS_PER_RIVAL,
    with_memory: bool = True,
    budget: Budget | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Samples]:
    """Each round times each rival for a share of the calls, so drift of clocks hits all alike.

    An exception ends only the rival that raised it and is kept in its samples. So does an end of
    the budget: a rival is let in while it leaves time for the rounds of those before it.
    """
    budget = budget or Budget()
    samples = {name: Samples() for name in prepares}
    for i_round in range(ROUNDS + 1):  # round 0 warms up and sizes the rounds
        if i_round > 1 and budget.left <= 0:
            break  # all have the same number of rounds
        for name, prepare in prepares.items():
            s = samples[name]
            if s.error is not None:
                continue
            say(f"{name}: {'warm-up' if i_round == 0 else f'round {i_round} of {ROUNDS}'}")
            try:
                if i_round == 0:
                    budget.ask(sum(x.rounds_s for x in samples.values()))
                    with budget.half_of_what_is_left(), prepare() as call:
                        _warm_up(call, s, device, reps, seconds)
                        if device == "cuda" and with_memory:
                            s.memory = memory_of(call)
                else:
                    with prepare() as call:
                        _round(call, s, device)
            except Exception as error:  # a rival's failure is a result, not ours
                s.error = error.with_traceback(None)  # a traceback would keep its tensors alive
                if device == "cuda":
                    torch.cuda.empty_cache()
    return samples


def _warm_up(call: Call, s: Samples, device: str, reps: int | None, seconds: float) -> None:
    """Compiles, tunes, and sets how many calls a round has."""
    begin = time.perf_counter()
    for i in range(WARMUP_CALLS):
        call()
        _synchronize(device)
        if i > 0 and time.perf_counter() - begin > WARMUP_S:
            break
    start = time.perf_counter()
    call()
    enqueued = time.perf_counter()
    _synchronize(device)
    call_s = max(time.perf_counter() - start, 1e-6)
    wanted = reps or min(max(int(seconds / call_s), MIN_REPS), MAX_REPS)
    s.reps_per_round = -(-wanted // ROUNDS)
    s.rounds_s = ROUNDS * (s.reps_per_round + 1) * call_s
    s.lead_cycles = int(2 * (enqueued - start) * CYCLES_PER_S)


def _round(call: Call, s: Samples, device: str) -> None:
    call()  # a fresh preparation allocates again
    if device == "cuda":
        s.times_ms += cuda_times(call, s.reps_per_round, lead_cycles=s.lead_cycles)
    else:
        s.times_ms += cpu_times(call, s.reps_per_round)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
