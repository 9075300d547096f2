"""Balancing of a teacher's prototypes: three iterations over T tokens and K prototypes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import sinkhorn_bias
from siglip2_kernels.prototype_cross_entropy import reference

from ..case import Case, Cost, Mode, Rival
from . import prototype_cross_entropy as head

TEMP = head.TEACHER_TEMP


def make(*, device: str, **options) -> list[Tensor]:  # (T, D), (K, D), ()
    """Teacher and prototypes, and an anchor for the runner's gradient."""
    anchor = torch.zeros((), device=device, requires_grad=True)
    return [*head.make(device=device, **options)[2:4], anchor]


def centred(bias: Tensor, anchor: Tensor) -> Tensor:  # (K,)
    """A softmax does not see what all biases share."""
    return bias - bias.mean() + anchor


def specification(teacher: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:  # (K,)
    return centred(reference.sinkhorn_bias(teacher, weight, teacher_temp=TEMP), anchor)


def eager(teacher: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:  # (K,)
    """DINOv2's function, whose first token's assignment tells the bias."""
    t = F.linear(teacher, weight).float()
    q = torch.exp(t / TEMP).t()
    num_prototypes, num_tokens = q.shape
    q /= torch.sum(q)
    for _ in range(3):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= num_prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= num_tokens
    q *= num_tokens
    return centred(q[:, 0].log() - t[0] / TEMP, anchor)


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    fn = partial(sinkhorn_bias, teacher_temp=TEMP, backend=backend)
    return Rival(
        build=lambda: lambda teacher, weight, anchor: centred(fn(teacher, weight), anchor),
        needs_cuda=needs_cuda,
        is_ours=True,
    )


def bytes_a_logit(num: float) -> Callable[..., float]:
    def min_bytes(mode: Mode, *, T: int, K: int, D: int, dtype: torch.dtype) -> float:
        return T * K * num

    return min_bytes


def cost(*, T: int, K: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    """Of keeping the logits: one product."""
    num_bytes = (T + K) * D * dtype.itemsize + 4 * K
    return {"forward": Cost(flops=2 * T * K * D, num_bytes=num_bytes)}


CASE = Case(
    x_name="K",
    x_label="prototypes",
    shapes=head.CASE.shapes,
    check_shapes=head.CASE.check_shapes,
    make=make,
    reference=specification,
    rivals={
        "eager": Rival(build=lambda: eager, min_bytes=bytes_a_logit(8)),
        "compile": Rival(
            build=lambda: torch.compile(eager, dynamic=False), min_bytes=bytes_a_logit(4)
        ),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
    },
    cost=cost,
    modes=("forward",),
)
