"""Runs one case: who can run, who is right, and then how long each takes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from . import ceiling
from .budget import Budget, OutOfTime
from .case import Case, Mode, Shape, differentiable, make_inputs, upstream
from .check import Accuracy, Checker
from .machine import Machine, git_commit, memory_bytes, peak_of
from .result import Result, Row
from .timing import SECONDS_PER_RIVAL, Call, Memory, Prepare, Samples, quantiles, time_rivals

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Fn = Callable[..., Tensor]


Fields = dict[str, Any]  # of a Row


class Verdicts(NamedTuple):
    accuracy: dict[str, Accuracy]  # rivals that may be timed
    refused: dict[str, Fields]  # the others -> status and detail of their rows


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure of a case."""

    op: str
    case: Case
    machine: Machine
    dtype: str  # of DTYPES
    shapes: Sequence[Shape]
    modes: Sequence[Mode]
    providers: Sequence[str] | None = None  # None: all
    broken: Mapping[str, str] = field(default_factory=dict)  # rivals not to be run -> why
    metrics: Sequence[str] = ("speed", "memory")
    reps: int | None = None  # None: as many as fit `seconds`, 5 to 100
    seconds: float = SECONDS_PER_RIVAL  # of calls timed, for each rival
    budget: Budget = field(default_factory=Budget)  # of the whole run
    say: Callable[[str], None] = field(default=lambda text: None)


def run_case(request: Request, verdicts: Verdicts | None = None) -> Result:
    """Rows by shape, mode, rival; a rival that is absent, wrong or fails has rows without times.

    Args:
        verdicts: `check_rivals` of the same case, dtype and providers, where it ran before.
    """
    verdicts = verdicts or check_rivals(request)
    case = request.case
    order = [*case.rivals]
    rows: list[Row] = []
    # A backward that runs again and again needs what it keeps: compiled ones reuse it otherwise.
    with torch._functorch.config.patch(donated_buffer="backward" not in request.modes):
        for shape in request.shapes:
            fns = _fresh(request, [*verdicts.accuracy])
            for mode in request.modes:
                new = _measure(request, shape, mode, fns, verdicts)
                new.sort(key=lambda row: order.index(row.provider))
                rows += _with_speedups(new, case.baseline)
    return Result(
        op=request.op,
        x_name=case.x_name,
        x_label=case.x_label,
        baseline=case.baseline,
        check_shape=dict(case.check_shapes[request.machine.device]),
        machine=request.machine,
        ours=[name for name, rival in case.rivals.items() if rival.is_ours],
        rows=rows,
    )


def check_rivals(request: Request) -> Verdicts:
    """Values and gradients of each rival against the specification in float64.

    It takes at most half of the time that the request has.
    """
    case, device = request.case, request.machine.device
    passed: dict[str, Accuracy] = {}
    refused: dict[str, Fields] = {}
    checker = None
    budget = request.budget.half()  # rivals that compile would leave no time to measure any
    for name in request.providers or case.rivals:
        reason = case.rivals[name].unsupported(device)
        if reason is not None:
            refused[name] = {"status": "skipped", "detail": reason}
            continue
        if name in request.broken:
            refused[name] = {"status": "failed", "detail": request.broken[name]}
            continue
        request.say(f"checking {name}")
        checker = checker or Checker(case, dtype=DTYPES[request.dtype], device=device)
        try:
            budget.ask()
            with budget.half_of_what_is_left():
                accuracy = checker.accuracy(case.rivals[name])
        except Exception as raised:  # whatever a rival does wrong is a line of the table
            refused[name] = _refusal(raised)
            continue
        if accuracy.units <= case.rivals[name].max_error:
            passed[name] = accuracy
        else:
            detail = f"error {accuracy.units:.3g}x"
            refused[name] = {"status": "wrong", "detail": detail, **_accuracy_fields(accuracy)}
    return Verdicts(passed, refused)


def call_of(fn: Fn, inputs: Sequence[Any], mode: Mode) -> Prepare:
    """`forward` is without gradients, as in evaluation; `full` is forward and backward."""

    @contextmanager
    def prepare() -> Iterator[Call]:
        if mode == "forward":
            with torch.no_grad():
                yield lambda: fn(*inputs)
            return
        wanted = differentiable(inputs)
        out = fn(*inputs)
        grad = upstream(out)
        if mode == "full":
            del out
            yield lambda: torch.autograd.grad(fn(*inputs), wanted, grad)
            return
        yield lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)

    return prepare


def _fresh(request: Request, names: Sequence[str]) -> dict[str, Fn]:
    """The rivals, built anew for one shape."""
    # Without this, torch.compile turns to dynamic shapes or gives up after some recompilations.
    torch.compiler.reset()
    return {name: request.case.rivals[name].build() for name in names}


def _measure(
    request: Request, shape: Shape, mode: Mode, fns: Mapping[str, Fn], verdicts: Verdicts
) -> list[Row]:
    """Rows of all rivals in one mode; what the device cannot hold is not tried."""
    dtype, device = DTYPES[request.dtype], request.machine.device
    skipped: dict[str, Fields] = dict(verdicts.refused)
    available_bytes = memory_bytes(device)
    for name in fns:
        reason = request.case.rivals[name].too_large(mode, shape, dtype, available_bytes)
        if reason is not None:
            why = {"status": "skipped", "detail": reason}
            skipped[name] = why | _accuracy_fields(verdicts.accuracy[name])
    tried = [name for name in fns if name not in skipped]
    rows = [_template(request, shape, mode, name, **why) for name, why in skipped.items()]
    if not tried:
        return rows
    inputs = make_inputs(request.case, shape, dtype=dtype, device=device)
    prepares = {ceiling.NAME: ceiling.product(dtype, device)}
    prepares |= {name: call_of(fns[name], inputs, mode) for name in tried}
    samples = _time(request, shape, mode, prepares)
    yardstick = samples.pop(ceiling.NAME)
    best_tflops = None
    if yardstick.error is None:
        best_tflops = ceiling.tflops(device, quantiles(yardstick.times_ms).p50)
    return rows + [
        _row(request, shape, mode, name, verdicts.accuracy[name], best_tflops, sample)
        for name, sample in samples.items()
    ]


def _time(
    request: Request, shape: Shape, mode: Mode, prepares: Mapping[str, Prepare]
) -> dict[str, Samples]:
    where = " ".join(f"{name}={size}" for name, size in shape.items())
    return time_rivals(
        prepares,
        device=request.machine.device,
        reps=request.reps,
        seconds=request.seconds,
        budget=request.budget,
        with_memory="memory" in request.metrics,
        say=lambda text: request.say(f"{request.op} {where} {mode}, {text}"),
    )


def _row(
    request: Request,
    shape: Shape,
    mode: Mode,
    name: str,
    accuracy: Accuracy,
    best_tflops: float | None,  # of matrix products here
    samples: Samples,
) -> Row:
    row = partial(_template, request, shape, mode, name, **_accuracy_fields(accuracy))
    if samples.error is not None:
        return row(**_refusal(samples.error))
    time_ms = quantiles(samples.times_ms)
    return row(
        status="ok",
        time_ms=time_ms,
        gemm_tflops=best_tflops,
        **memory_fields(request, shape, mode, name, samples.memory),
        **_rates(request, shape, mode, time_ms.p50 / 1e3, best_tflops),
    )


def memory_fields(
    request: Request, shape: Shape, mode: Mode, name: str, memory: Memory | None
) -> Fields:
    """The peak, and what of it is neither returned nor a float32 sum of what is returned."""
    if memory is None:
        return {}
    accumulators = request.case.rivals[name].accumulator_bytes(mode, **shape) / 2**20
    workspace = max(memory.peak_mib - memory.returned_mib - accumulators, 0.0)
    return {"peak_mib": memory.peak_mib, "workspace_mib": workspace}


def _rates(
    request: Request, shape: Shape, mode: Mode, seconds: float, best_tflops: float | None
) -> Fields:
    """What the time means: rates, and shares of the measured and of the datasheet's limit."""
    dtype = DTYPES[request.dtype]
    cost = request.case.cost(**shape, dtype=dtype).get(mode)
    if cost is None:
        return {}
    rate = cost.flops / seconds / 1e12
    rates = {"tflops": rate, "gbytes_per_s": cost.num_bytes / seconds / 1e9}
    if best_tflops is not None:
        rates["gemm_share"] = rate / best_tflops
    peak = peak_of(request.machine.name) if request.machine.device == "cuda" else None
    if peak is None:
        return rates
    tflops = peak.fp32_tflops if dtype == torch.float32 else peak.tensor_tflops
    best_s = max(cost.flops / (tflops * 1e12), cost.num_bytes / (peak.tbytes_per_s * 1e12))
    return rates | {"roofline": best_s / seconds}


def _template(request: Request, shape: Shape, mode: Mode, provider: str, **fields: Any) -> Row:
    return Row(
        op=request.op,
        provider=provider,
        mode=mode,
        dtype=request.dtype,
        shape=dict(shape),
        commit=git_commit(),
        timestamp=time.strftime("%Y-%m-%d %H:%M:%S"),
        **fields,
    )


def _with_speedups(rows: list[Row], baseline: str) -> list[Row]:
    base = next((r.time_ms for r in rows if r.provider == baseline and r.time_ms), None)
    if base is None:
        return rows
    return [replace(r, speedup=base.p50 / r.time_ms.p50) if r.time_ms else r for r in rows]


def _accuracy_fields(accuracy: Accuracy) -> Fields:
    finite = {k: e for k, e in accuracy.grad_errors.items() if math.isfinite(e)}
    return {
        "error": accuracy.units if math.isfinite(accuracy.units) else None,
        "grad_errors": finite,
    }


def _refusal(error: Exception) -> Fields:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, NotImplementedError | OutOfTime):
        is_late = {"dropped": True} if isinstance(error, OutOfTime) else {}
        return {"status": "skipped", "detail": first_line, **is_late}
    return {"status": "failed", "detail": f"{type(error).__name__}: {first_line}"}
