"""The middle of an MLP: GELU of a product and its bias, T tokens wide M."""

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import bias_gelu
from siglip2_kernels.bias_gelu.reference import bias_gelu as reference

from ..case import Case, Cost, Rival


def make(
    *, T: int, M: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> list[Tensor]:  # (T, M), (M,) float32
    h = torch.randn(T, M, device=device, generator=generator).to(dtype)
    bias = torch.randn(M, device=device, generator=generator)
    return [h.requires_grad_(), bias.requires_grad_()]


def eager(h: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(h + bias.to(h.dtype), approximate="tanh")


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def build():
        return lambda h, bias: bias_gelu(h, bias, backend=backend)

    return Rival(build=build, needs_cuda=needs_cuda, is_ours=True)


def cost(*, T: int, M: int, dtype: torch.dtype) -> dict[str, Cost]:
    one = T * M * dtype.itemsize
    forward, backward = Cost(flops=0, num_bytes=2 * one), Cost(flops=0, num_bytes=3 * one)
    return {"forward": forward, "backward": backward, "full": Cost(flops=0, num_bytes=5 * one)}


CASE = Case(
    x_name="M",
    x_label="width of the MLP",
    shapes=[{"T": 64, "M": 256}, *({"T": 65_536, "M": M} for M in (3072, 4096, 4304, 6144))],
    check_shapes={"cpu": {"T": 50, "M": 300}, "cuda": {"T": 5_000, "M": 4304}},
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
