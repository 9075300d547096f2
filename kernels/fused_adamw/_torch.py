"""torch's own fused AdamW, then its foreach kernels: the CPU's choice, and a GPU's without Triton.

Scale and clip reach the gradients as `grad_scale`, which torch divides by and writes back.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .ema import average
from .inputs import Settings, Tensors


def unsupported(tensors: Tensors, settings: Settings) -> str | None:
    if isinstance(settings.weight_decay, Tensor) and settings.weight_decay.device.type != "cpu":
        return "torch's fused AdamW takes weight decay as a number, not as a tensor on a GPU"
    return None


def step(tensors: Tensors, settings: Settings) -> None:
    s = settings
    adamw(
        list(tensors.params),
        list(tensors.grads),
        list(tensors.exp_avgs),
        list(tensors.exp_avg_sqs),
        [],
        list(tensors.steps),
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=s.lr,
        beta1=s.beta1,
        beta2=s.beta2,
        eps=s.eps,
        weight_decay=float(s.weight_decay),
        grad_scale=_divisor(s),
        found_inf=s.found_inf,
    )
    pairs = [(t, p) for t, p in zip(tensors.teachers, tensors.params, strict=True) if t is not None]
    if pairs:
        average(*zip(*pairs, strict=True), momentum=s.momentum, found_inf=s.found_inf)
    for copies, sources in (
        (tensors.copies, tensors.params),
        (tensors.teacher_copies, tensors.teachers),
    ):
        kept = [(c, x) for c, x in zip(copies, sources, strict=True) if c is not None]
        if kept:
            torch._foreach_copy_(*zip(*kept, strict=True))


def _divisor(s: Settings) -> Tensor | None:
    if s.clip_coefficient is None:
        return s.grad_scale
    one = s.clip_coefficient.float().reciprocal()
    return one if s.grad_scale is None else one * s.grad_scale
