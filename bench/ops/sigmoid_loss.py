"""One device's share of the SigLIP loss: B images against their B captions, width D."""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import sigmoid_loss
from siglip2_kernels.sigmoid_loss.reference import sigmoid_loss as reference

from ..case import Case, Cost, Rival

CHUNK_ROWS = 4096  # of open_clip's chunked loss; siglip-kernel picks the same on Hopper


def make(
    *, B: int, D: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> list[Tensor]:  # (B, D), (B, D), (), ()
    """Unit embeddings, positives closer than chance, at the initial temperature and bias."""
    draw = partial(torch.randn, B, D, device=device, generator=generator)
    img = F.normalize(draw(), dim=-1)
    txt = F.normalize(0.3 * img + F.normalize(draw(), dim=-1), dim=-1)
    scalars = [torch.tensor(v, device=device) for v in (math.log(10.0), -10.0)]
    return [t.requires_grad_() for t in (img.to(dtype), txt.to(dtype), *scalars)]


def eager(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (B, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
) -> Tensor:  # ()
    """The formula as one writes it by hand: the product in the inputs' dtype, the rest in float32.

    Not the specification, whose float32 product leaves the tensor cores of a GPU unused: beating
    that would say nothing.
    """
    z = ((log_scale.exp() * img) @ txt.T).float() + bias  # (B, B)
    # softplus(-z) = softplus(z) - z at the positives: no (B, B) matrix of labels, the lean form.
    return (F.softplus(z).sum() - z.diagonal().sum()) / z.shape[0]


def siglip_kernel() -> Callable[..., Tensor]:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss


def open_clip(**options: int) -> Callable[..., Tensor]:
    """open_clip's loss as its training loop calls it: under autocast for 16-bit features."""
    from open_clip.loss import SigLipLoss

    missing = options.keys() - inspect.signature(SigLipLoss).parameters.keys()
    if missing:
        raise NotImplementedError(f"this open_clip's SigLipLoss has no {', '.join(missing)}")
    module = SigLipLoss(**options)

    def loss(img: Tensor, txt: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        is_half = img.dtype != torch.float32
        with torch.autocast(img.device.type, dtype=img.dtype if is_half else None, enabled=is_half):
            return module(img, txt, log_scale.exp(), bias)

    return loss


def cost(*, B: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    features_bytes = 2 * B * D * dtype.itemsize
    return {
        "forward": Cost(flops=2 * B * B * D, num_bytes=features_bytes),
        "full": Cost(flops=6 * B * B * D, num_bytes=2 * features_bytes),
    }


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    return Rival(
        build=lambda: partial(sigmoid_loss, backend=backend), needs_cuda=needs_cuda, is_ours=True
    )


CASE = Case(
    x_name="B",
    x_label="image-text pairs",
    shapes=[{"B": 96, "D": 64}, *({"B": 1 << n, "D": 768} for n in range(12, 17))],
    # Larger than a chunk and no multiple of one, nor of a tile: the short last one has to be right.
    check_shapes={"cpu": {"B": 200, "D": 64}, "cuda": {"B": CHUNK_ROWS + 296, "D": 768}},
    make=make,
    reference=reference,
    rivals={
        "eager": Rival(build=lambda: eager),
        "compile": Rival(build=lambda: torch.compile(eager, dynamic=False)),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
        "siglip-kernel": Rival(
            build=siglip_kernel, module="siglip_kernel", pip="siglip-kernel", needs_cuda=True
        ),
        "open_clip": Rival(build=open_clip, module="open_clip", pip="open_clip_torch"),
        "open_clip-chunked": Rival(
            build=partial(open_clip, chunk_size=CHUNK_ROWS),
            module="open_clip",
            pip="open_clip_torch",
        ),
    },
    cost=cost,
)
