"""Packed bytes to tokens: T patches of 16 x 16 pixels, positions added."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import patch_embed
from siglip2_kernels.patch_embed.reference import patch_embed as specification

from ..case import Case, Cost, Rival

K = 768  # 16 x 16 pixels of 3 channels


def make(
    *, T: int, D: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> list[Tensor]:  # (T, 768) uint8, (D, 768), (D,), (T, D)
    draw = partial(torch.randn, device=device, generator=generator)
    patches = torch.randint(0, 256, (T, K), device=device, generator=generator, dtype=torch.uint8)
    learned = (draw(D, K) / K**0.5, draw(D), draw(T, D).to(dtype))
    return [patches, *(x.requires_grad_() for x in learned)]


def reference(patches: Tensor, weight: Tensor, bias: Tensor, posemb: Tensor) -> Tensor:  # (T, D)
    return specification(patches, weight, bias, posemb=posemb, dtype=posemb.dtype)


def eager(patches: Tensor, weight: Tensor, bias: Tensor, posemb: Tensor) -> Tensor:
    x = patches.to(posemb.dtype) / 127.5 - 1
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)) + posemb


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def run(patches: Tensor, weight: Tensor, bias: Tensor, posemb: Tensor) -> Tensor:
        options = {"posemb": posemb, "dtype": posemb.dtype, "backend": backend}
        return patch_embed(patches, weight, bias, **options)

    return Rival(build=lambda: run, needs_cuda=needs_cuda, is_ours=True)


def cost(*, T: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    tokens_bytes, weight_bytes = T * D * dtype.itemsize, D * K * 4
    forward = Cost(flops=2 * T * K * D, num_bytes=T * K + weight_bytes + 2 * tokens_bytes)
    full = Cost(flops=4 * T * K * D, num_bytes=2 * T * K + 2 * weight_bytes + 4 * tokens_bytes)
    return {"forward": forward, "full": full}


CASE = Case(
    x_name="T",
    x_label="patches",
    shapes=[
        {"T": 70, "D": 32},
        *({"T": T, "D": D} for D in (768, 1152) for T in (16_384, 65_536)),
    ],
    check_shapes={"cpu": {"T": 70, "D": 32}, "cuda": {"T": 4096 + 77, "D": 1152}},
    make=make,
    reference=reference,
    rivals={
        "eager": Rival(build=lambda: eager),
        "compile": Rival(build=lambda: torch.compile(eager, dynamic=False)),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
    },
    cost=cost,
)
