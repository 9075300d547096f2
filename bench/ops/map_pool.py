"""The MAP head's attention over B packed sequences of N tokens, before its output projection."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import map_pool
from siglip2_kernels.map_pool.reference import map_pool as specification

from ..case import Case, Cost, Rival

WIDTH_OF_A_HEAD = 64


def make(
    *, B: int, N: int, D: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> list[Tensor]:  # (B * N, D), (B + 1,), and the head's five parameters
    draw = partial(torch.randn, device=device, generator=generator)
    cu_seqlens = torch.arange(B + 1, device=device, dtype=torch.int32) * N
    x = draw(B * N, D).to(dtype)
    weights = (draw(1, D), draw(D, D) / D**0.5, draw(D), draw(2 * D, D) / D**0.5, draw(2 * D))
    return [x.requires_grad_(), cu_seqlens, *(w.requires_grad_() for w in weights)]


def _heads(x: Tensor) -> int:
    return x.shape[1] // WIDTH_OF_A_HEAD


def reference(x: Tensor, cu_seqlens: Tensor, *weights: Tensor) -> Tensor:  # (B, D)
    return specification(x, cu_seqlens, *weights, num_heads=_heads(x))


def dense(x: Tensor, cu_seqlens: Tensor, *weights: Tensor) -> Tensor:
    """Keys and values of all tokens, then SDPA with one query a sequence: the padded form."""
    probe, q_weight, q_bias, kv_weight, kv_bias = (w.to(x.dtype) for w in weights)
    B, H = cu_seqlens.shape[0] - 1, _heads(x)
    q = F.linear(probe, q_weight, q_bias).view(1, H, 1, -1).expand(B, -1, -1, -1)
    kv = F.linear(x, kv_weight, kv_bias).view(B, -1, 2, H, WIDTH_OF_A_HEAD)
    k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, N, E)
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def run(x: Tensor, cu_seqlens: Tensor, *weights: Tensor) -> Tensor:
        longest = x.shape[0] // (cu_seqlens.shape[0] - 1)
        return map_pool(x, cu_seqlens, longest, *weights, num_heads=_heads(x), backend=backend)

    return Rival(build=lambda: run, needs_cuda=needs_cuda, is_ours=True)


def cost(*, B: int, N: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    heads, tokens_bytes = D // WIDTH_OF_A_HEAD, B * N * D * dtype.itemsize
    forward = Cost(flops=4 * B * N * heads * D, num_bytes=tokens_bytes + 3 * D * D * 4)
    full = Cost(flops=12 * B * N * heads * D, num_bytes=3 * tokens_bytes + 6 * D * D * 4)
    return {"forward": forward, "full": full}


_SIZES = ((256, 256), (64, 1024))

CASE = Case(
    x_name="N",
    x_label="tokens a sequence",
    shapes=[
        {"B": 3, "N": 20, "D": 128},
        *({"B": B, "N": N, "D": D} for D in (768, 1152) for B, N in _SIZES),
    ],
    check_shapes={"cpu": {"B": 3, "N": 20, "D": 128}, "cuda": {"B": 5, "N": 247, "D": 1152}},
    make=make,
    reference=reference,
    rivals={
        "dense": Rival(build=lambda: dense),
        "compile": Rival(build=lambda: torch.compile(dense, dynamic=False)),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
    },
    cost=cost,
)
