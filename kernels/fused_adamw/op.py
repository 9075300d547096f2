"""One optimisation step of a list of parameters, in place and in one pass over their elements.

    g <- g clip / scale
    m <- m + (1 - b1) (g - m),   v <- v + (1 - b2) (g^2 - v)
    p <- p - lr (wd p + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps))
    teacher <- teacher + (1 - momentum) (p - teacher)

Bound by memory: 28 bytes a parameter, 36 with a teacher, 2 more for each half-precision copy.

It is no torch.library op: nothing differentiates or traces an optimiser's step.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._core.backend import choose, no_triton
from . import _torch, reference
from .inputs import Number, Settings, Tensors, check

Backend = Literal["triton", "torch", "reference"]


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return {"torch": _torch, "reference": reference}[name]


def _unsupported(tensors: Tensors, settings: Settings) -> dict[str, str | None]:
    triton = no_triton(tensors.params[0])
    if triton is None:
        triton = _backend("triton").unsupported(tensors, settings)
    return {"triton": triton, "torch": _torch.unsupported(tensors, settings), "reference": None}


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a float32 parameter on `device`; None: it does."""
    p = [torch.empty(8, device=device)]
    settings = Settings(1e-3, 0.9, 0.95, 1e-8, 0.1, None, None, None, None)
    return _unsupported(Tensors(p, p, p, p, p, [None], [None], [None]), settings)


def _run(tensors: Tensors, settings: Settings, backend: Backend | None) -> None:
    check(tensors, settings)
    if not tensors.params:
        return
    device = tensors.params[0].device
    name = choose(backend, _unsupported(tensors, settings), device)
    with torch.no_grad():
        _backend(name).step(tensors, settings)


def fused_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Number,
    clip_coefficient: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    teachers: Sequence[Tensor | None] | None = None,
    momentum: Number | None = None,
    copies: Sequence[Tensor | None] | None = None,
    teacher_copies: Sequence[Tensor | None] | None = None,
    backend: Backend | None = None,
) -> None:
    """AdamW as torch.optim.AdamW has it, on gradients times clip_coefficient / grad_scale.

    Everything is updated in place; nothing is where `found_inf` is 1. Gradients may be overwritten
    by the scaled ones. Deterministic. Numbers may be tensors of one element: on a GPU they are read
    when the step runs, so that schedules work in a CUDA graph. Nothing waits for the device.

    Args:
        steps: Updates so far, a float32 tensor of one element for each parameter.
        clip_coefficient: At most 1 for clipping to a norm.
        found_inf: 1.0 or 0.0, as `torch.amp.GradScaler` makes it.
        teachers: Averages of the weights, float32; None entries have none.
        momentum: Of the teachers, in float64 where it is a tensor: 1 - momentum is what is used.
        copies: The new weights in bfloat16 or float16.
        teacher_copies: The new teachers in bfloat16 or float16.
        backend: None takes "triton" on a GPU and "torch" on the CPU.

    Raises:
        ValueError: Lists differ in length, shape or device; a number is out of range.
        NotImplementedError: The asked-for backend does not take this input.
    """
    absent = [None] * len(params)
    tensors = Tensors(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        absent if teachers is None else teachers,
        absent if copies is None else copies,
        absent if teacher_copies is None else teacher_copies,
    )
    settings = Settings(
        lr, beta1, beta2, eps, weight_decay, momentum, clip_coefficient, grad_scale, found_inf
    )
    _run(tensors, settings, backend)
