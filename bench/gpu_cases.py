"""The benches of `make gpu`: each op within its time, the targets' shapes first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import ops
from .budget import Budget
from .case import MODES, Mode
from .cli import save
from .gpu_state import State, key
from .machine import Machine
from .progress import Progress
from .report import console
from .result import Result
from .runner import DTYPES, Request, Verdicts, check_rivals, run_case

SECONDS_PER_RIVAL = 0.4  # of calls timed: less than elsewhere, since all share the op's time


class DeadDeviceError(Exception):
    """A kernel ended the process's CUDA context: only a new process can go on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked of `make gpu`."""

    parts: Sequence[str]
    ops: Sequence[str]
    modes: Sequence[Mode] | None  # None: each case's own
    skip: Sequence[str]  # rivals
    seconds: float  # for each op


def run_cases(plan: Plan, state: State, machine: Machine, out: Path) -> None:
    """Every case, dtype and shape that `state` lacks; it is written after each.

    Raises:
        DeadDeviceError: CUDA ended; `state` says which rival it was, and leaves that one out.
    """
    for op in plan.ops:
        budget = Budget(plan.seconds)
        for dtype in (name for name, kind in DTYPES.items() if kind in ops.load(op).dtypes):
            request = _request(plan, state, machine, op, dtype, budget)
            if request.shapes:
                _run(request, state, out)


def _request(
    plan: Plan, state: State, machine: Machine, op: str, dtype: str, budget: Budget
) -> Request:
    case = ops.load(op)
    shapes = case.shapes if machine.device == "cpu" else case.shapes[1:]
    return Request(
        op=op,
        case=case,
        machine=machine,
        dtype=dtype,
        shapes=[shape for shape in shapes if key(op, shape, dtype) not in state.done],
        modes=sorted(plan.modes or case.modes, key=MODES.index, reverse=True),
        providers=[name for name in case.rivals if name not in plan.skip],
        broken=state.broken.get(op, {}),
        seconds=SECONDS_PER_RIVAL,
        budget=budget,
        say=Progress(),
    )


def _run(request: Request, state: State, out: Path) -> None:
    op = request.op
    try:
        verdicts = check_rivals(request)
    except Exception as error:  # the baseline itself: nothing of this op can be compared
        print(f"{op}: {type(error).__name__}: {error}", flush=True)
        state.checks[f"bench of {op}"] = False
        state.write()
        return
    _leave_out_what_ended_cuda(request, verdicts, state)
    for i, shape in enumerate(request.shapes):
        if request.budget.left <= 0:
            spent = f"the {request.budget.seconds:.0f} s of {op} are used up"
            print(f"{spent}; {len(request.shapes) - i} shapes are left to another run", flush=True)
            return
        result = run_case(replace(request, shapes=[shape]), verdicts)
        print(console(result), end="\n\n", flush=True)
        save(result, out)
        _leave_out_what_ended_cuda(request, result, state)
        if not any(row.dropped for row in result.rows):
            state.done.append(key(op, shape, request.dtype))
            state.write()


def _leave_out_what_ended_cuda(request: Request, found: Verdicts | Result, state: State) -> None:
    """Does nothing while the device answers. The first rival with a CUDA error is to blame."""
    try:
        if request.machine.device == "cuda":
            torch.cuda.synchronize()
        return
    except RuntimeError as error:
        ended = str(error).strip().partition("\n")[0]
    if isinstance(found, Result):
        details = {row.provider: row.detail for row in found.rows if row.status == "failed"}
    else:
        details = {name: why["detail"] for name, why in found.refused.items() if "detail" in why}
    name = next((name for name, detail in details.items() if "CUDA" in detail), None)
    if name is None:
        raise DeadDeviceError(f"{request.op}: {ended}")
    state.broken.setdefault(request.op, {})[name] = details[name]
    state.checks[f"bench of {request.op}"] = False
    state.write()
    raise DeadDeviceError(f"{request.op}, {name}: {details[name]}")
