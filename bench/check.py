"""Right before fast: a rival's value and gradients against the specification in float64.

The measure is the relative L2 error of each tensor.  Its unit is what the baseline (eager PyTorch
in the same dtype) errs, plus one rounding of the dtype: a rival passes at no more than `MAX_ERROR`
units.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .case import Case, differentiable, make_inputs, upstream

MAX_ERROR = 2.0


def value_and_grads(fn: Callable[..., Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    out = fn(*inputs)
    return [out.detach(), *torch.autograd.grad(out, differentiable(inputs), upstream(out))]


def relative_error(actual: Tensor, gold: Tensor) -> float:
    """|actual - gold| / |gold|, in L2; the absolute error where gold is zero."""
    if actual.shape != gold.shape:
        raise ValueError(f"need shape {tuple(gold.shape)}, got {tuple(actual.shape)}")
    gold_norm = gold.norm()
    return float((actual.double() - gold).norm() / torch.where(gold_norm > 0, gold_norm, 1.0))


class Checker:
    """Holds the float64 answer and the baseline's own errors for one case and dtype."""

    def __init__(self, case: Case, *, dtype: torch.dtype, device: str) -> None:
        self._inputs = make_inputs(case, case.check_shapes[device], dtype=dtype, device=device)
        self._gold = value_and_grads(case.reference, [_to_double(t) for t in self._inputs])
        rounding = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
        baseline = case.rivals[case.baseline].build()
        self._units = [error + rounding for error in self._errors(baseline)]

    def error(self, fn: Callable[..., Tensor]) -> float:
        """The largest error over value and gradients, in units; NaN if anything is NaN."""
        ratios = [e / u for e, u in zip(self._errors(fn), self._units, strict=True)]
        return float(torch.tensor(ratios).max())  # unlike max(), this keeps NaN

    def _errors(self, fn: Callable[..., Tensor]) -> list[float]:
        results = value_and_grads(fn, self._inputs)
        return [relative_error(a, g) for a, g in zip(results, self._gold, strict=True)]


def _to_double(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
