"""The teacher's average by torch's own operations, for tensors that no other pass touches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import Number


def average(
    teachers: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    momentum: Number,
    found_inf: Tensor | None = None,
) -> None:
    """teacher += (1 - momentum) (param - teacher), in place; not where `found_inf` is 1."""
    weight = 1 - (momentum.double() if isinstance(momentum, Tensor) else momentum)
    if found_inf is not None:  # a weight of 0, so that nobody waits to read it
        weight = weight * (1 - found_inf.double())
    if not isinstance(weight, Tensor):
        torch._foreach_lerp_(list(teachers), list(params), weight)
        return
    for teacher, param in zip(teachers, params, strict=True):
        teacher.lerp_(param, weight.to(teacher.device, teacher.dtype).reshape(()))
