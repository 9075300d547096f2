"""Right before fast: a rival's value and gradients against the specification in float64.

The measure is the relative L2 error of each tensor.  Its unit is what the baseline (eager PyTorch
in the same dtype) errs, plus one rounding of the dtype: a rival passes at no more than its
`max_error` units in every regime of the case.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import Case, Rival, differentiable, make_inputs, upstream


class Accuracy(NamedTuple):
    """How far a rival is from float64."""

    units: float  # the worst of all values and gradients; NaN if anything is NaN
    grad_errors: dict[str, float]  # regime -> relative L2 error of the worst tensor's gradient


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
    """Holds the baseline's own errors for one case and dtype, in each of the case's regimes."""

    def __init__(self, case: Case, *, dtype: torch.dtype, device: str) -> None:
        shape = case.check_shapes[device]
        self._case = case
        self._inputs = {
            label: make_inputs(case, shape, dtype=dtype, device=device, **regime)
            for label, regime in case.regimes.items()
        }
        rounding = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
        baseline = case.rivals[case.baseline].build()
        self._units = {
            label: [error + rounding for error in self._errors(label, baseline, case.reference)]
            for label in self._inputs
        }

    def accuracy(self, rival: Rival) -> Accuracy:
        fn, reference = rival.build(), rival.reference or self._case.reference
        ratios: list[float] = []
        grad_errors: dict[str, float] = {}
        for label, inputs in self._inputs.items():
            errors = self._errors(label, fn, reference)
            ratios += [e / u for e, u in zip(errors, self._units[label], strict=True)]
            of_tensors = [
                error
                for error, x in zip(errors[1:], differentiable(inputs), strict=True)
                if x.ndim > 0
            ]
            if label and of_tensors:
                grad_errors[label] = _worst(of_tensors)
        return Accuracy(_worst(ratios), grad_errors)

    def _errors(
        self, label: str, fn: Callable[..., Tensor], reference: Callable[..., Tensor]
    ) -> list[float]:
        inputs = self._inputs[label]
        gold = value_and_grads(reference, [_to_double(x) for x in inputs])
        results = value_and_grads(fn, inputs)
        return [relative_error(a, g) for a, g in zip(results, gold, strict=True)]


def _worst(errors: list[float]) -> float:
    return float(torch.tensor(errors, dtype=torch.float64).max())  # unlike max(), this keeps NaN


def _to_double(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
