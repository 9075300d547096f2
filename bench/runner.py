"""Runs one case: who can run, who is right, and then how long each takes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import Case, Mode, Shape, differentiable, make_inputs, upstream
from .check import MAX_ERROR, Checker
from .machine import Machine, git_commit, peak_of
from .result import Result, Row
from .timing import Call, Prepare, Samples, quantiles, time_rivals

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Fn = Callable[..., Tensor]


class Verdicts(NamedTuple):
    errors: dict[str, float]  # rivals that may be timed -> error, in units of bench/check.py
    refused: dict[str, dict[str, Any]]  # the others -> status and detail of their rows


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
    metrics: Sequence[str] = ("speed", "memory")
    reps: int | None = None  # None: as many as fit a second, 10 to 100
    say: Callable[[str], None] = field(default=lambda text: None)


def run_case(request: Request, verdicts: Verdicts | None = None) -> Result:
    """Rows by shape, mode, rival; a rival that is absent, wrong or fails has rows without times.

    Args:
        verdicts: `check_rivals` of the same case, dtype and providers, where it ran before.
    """
    errors, refused = verdicts or check_rivals(request)
    order = [*request.case.rivals]
    rows: list[Row] = []
    for shape in request.shapes:
        prepares = _prepares(request, shape, [*errors])
        for mode in request.modes:
            samples = _time(request, shape, mode, {n: p(mode) for n, p in prepares.items()})
            new = [_row(request, shape, mode, n, errors[n], s) for n, s in samples.items()]
            new += [_template(request, shape, mode, name, **why) for name, why in refused.items()]
            new.sort(key=lambda row: order.index(row.provider))
            rows += _with_speedups(new, request.case.baseline)
    case = request.case
    return Result(
        op=request.op,
        x_name=case.x_name,
        x_label=case.x_label,
        baseline=case.baseline,
        machine=request.machine,
        ours=[name for name, rival in case.rivals.items() if rival.is_ours],
        rows=rows,
    )


def check_rivals(request: Request) -> Verdicts:
    """Values and gradients of each rival against the specification in float64."""
    case, device = request.case, request.machine.device
    errors: dict[str, float] = {}
    refused: dict[str, dict[str, Any]] = {}
    checker = None
    for name in request.providers or case.rivals:
        reason = case.rivals[name].unsupported(device)
        if reason is not None:
            refused[name] = {"status": "skipped", "detail": reason}
            continue
        request.say(f"checking {name}")
        checker = checker or Checker(case, dtype=DTYPES[request.dtype], device=device)
        try:
            error = checker.error(case.rivals[name].build())
        except Exception as raised:  # whatever a rival does wrong is a line of the table
            refused[name] = _refusal(raised)
            continue
        if error <= MAX_ERROR:
            errors[name] = error
        else:
            known = error if math.isfinite(error) else None
            refused[name] = {"status": "wrong", "detail": f"error {error:.3g}x", "error": known}
    return Verdicts(errors, refused)


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


def _prepares(
    request: Request, shape: Shape, names: Sequence[str]
) -> dict[str, Callable[[Mode], Prepare]]:
    """The rivals, freshly built, over the inputs of one shape."""
    dtype, device = DTYPES[request.dtype], request.machine.device
    inputs = make_inputs(request.case, shape, dtype=dtype, device=device)
    # Without this, torch.compile turns to dynamic shapes or gives up after some recompilations.
    torch.compiler.reset()
    rivals = request.case.rivals
    return {name: partial(call_of, rivals[name].build(), inputs) for name in names}


def _time(
    request: Request, shape: Shape, mode: Mode, prepares: Mapping[str, Prepare]
) -> dict[str, Samples]:
    where = " ".join(f"{name}={size}" for name, size in shape.items())
    return time_rivals(
        prepares,
        device=request.machine.device,
        reps=request.reps,
        with_memory="memory" in request.metrics,
        say=lambda text: request.say(f"{request.op} {where} {mode}, {text}"),
    )


def _row(
    request: Request, shape: Shape, mode: Mode, name: str, error: float, samples: Samples
) -> Row:
    if samples.error is not None:
        return _template(request, shape, mode, name, error=error, **_refusal(samples.error))
    time_ms = quantiles(samples.times_ms)
    row = _template(request, shape, mode, name, status="ok", error=error, time_ms=time_ms)
    row = replace(row, peak_mib=samples.peak_mib)
    dtype = DTYPES[request.dtype]
    cost = request.case.cost(**shape, dtype=dtype).get(mode)
    if cost is None:
        return row
    seconds = time_ms.p50 / 1e3
    row = replace(
        row, tflops=cost.flops / seconds / 1e12, gbytes_per_s=cost.num_bytes / seconds / 1e9
    )
    peak = peak_of(request.machine.name) if request.machine.device == "cuda" else None
    if peak is None:
        return row
    tflops = peak.fp32_tflops if dtype == torch.float32 else peak.tensor_tflops
    best_s = max(cost.flops / (tflops * 1e12), cost.num_bytes / (peak.tbytes_per_s * 1e12))
    return replace(row, roofline=best_s / seconds)


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


def _refusal(error: Exception) -> dict[str, Any]:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory"}
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, NotImplementedError):
        return {"status": "skipped", "detail": first_line}
    return {"status": "failed", "detail": f"{type(error).__name__}: {first_line}"}
