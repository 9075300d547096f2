"""Time and peak memory of one call: medians, L2-cold, launch gaps hidden, rivals taking turns.

Why each step is there: bench/README.md.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

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


@dataclass
class Samples:
    """What one rival's rounds gave: times, or the error that ended them."""

    times_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    reps_per_round: int = 0
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


def peak_mib(call: Call) -> float:
    """Most CUDA memory the call held beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_rivals(
    prepares: Mapping[str, Prepare],
    *,
    device: str,
    reps: int | None = None,  # None: as many as fit a second, 5 to 100
    with_memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Samples]:
    """Each round times each rival for a share of the calls, so drift of clocks hits all alike.

    An exception ends only the rival that raised it and is kept in its samples.
    """
    samples = {name: Samples() for name in prepares}
    for i_round in range(ROUNDS + 1):  # round 0 warms up and sizes the rounds
        for name, prepare in prepares.items():
            s = samples[name]
            if s.error is not None:
                continue
            say(f"{name}: {'warm-up' if i_round == 0 else f'round {i_round} of {ROUNDS}'}")
            try:
                with prepare() as call:
                    _round(call, s, i_round, device, reps, with_memory)
            except Exception as error:  # a rival's failure is a result, not ours
                s.error = error.with_traceback(None)  # a traceback would keep its tensors alive
                if device == "cuda":
                    torch.cuda.empty_cache()
    return samples


def _round(
    call: Call, s: Samples, i_round: int, device: str, reps: int | None, with_memory: bool
) -> None:
    if i_round == 0:
        _size_rounds(call, s, device, reps)
        if device == "cuda" and with_memory:
            s.peak_mib = peak_mib(call)
        return
    call()  # a fresh preparation allocates again
    if device == "cuda":
        s.times_ms += cuda_times(call, s.reps_per_round, lead_cycles=s.lead_cycles)
    else:
        s.times_ms += cpu_times(call, s.reps_per_round)


def _size_rounds(call: Call, s: Samples, device: str, reps: int | None) -> None:
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
    wanted = reps or min(max(int(SECONDS_PER_RIVAL / call_s), MIN_REPS), MAX_REPS)
    s.reps_per_round = -(-wanted // ROUNDS)
    s.lead_cycles = int(2 * (enqueued - start) * CYCLES_PER_S)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
