"""A language model's head and its loss: T tokens, V words, width D."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

from ..case import Case, Cost, Mode, Rival

VOCABULARY = 256_000  # Gemma's, which SigLIP 2 has
SPREAD = 8.0  # standard deviation of logits in the second regime: a trained head's


def make(
    *,
    T: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    spread: float = 1.0,
) -> list[Tensor]:  # (T, D), (V, D), (T,)
    draw = partial(torch.randn, device=device, generator=generator)
    x, weight = draw(T, D), draw(V, D) * (spread / D**0.5)
    target = torch.randint(0, V, (T,), device=device, generator=generator)
    return [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target]


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As trainers write it: logits in the model's dtype, the loss in float32."""
    return F.cross_entropy((x @ weight.T).float(), target)


def torch_fused() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError("this torch has no F.linear_cross_entropy")
    return F.linear_cross_entropy


def liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: module(weight, x, target)


def cut_cross_entropy() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy as fused

    return lambda x, weight, target: fused(x, weight, target)


def quack() -> Callable[..., Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, weight, target: chunked_linear_cross_entropy(
        x, weight, target, reduction="mean"
    )


def logits_bytes(forward: float, full: float) -> Callable[..., float]:
    """Least memory of an implementation that holds something for each token and word."""

    def min_bytes(mode: Mode, *, T: int, V: int, D: int, dtype: torch.dtype) -> float:
        return T * V * (forward if mode == "forward" else full)

    return min_bytes


def ours(backend: str | None = None, *, needs_cuda: bool = False, **options: int) -> Rival:
    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, backend=backend, **options)

    return Rival(build=lambda: run, needs_cuda=needs_cuda, is_ours=True)


def cost(*, T: int, V: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    operands = (T + V) * D * dtype.itemsize
    return {
        "forward": Cost(flops=2 * T * V * D, num_bytes=operands),
        "full": Cost(flops=6 * T * V * D, num_bytes=2 * operands),
    }


CASE = Case(
    x_name="T",
    x_label="tokens",
    shapes=[
        {"T": 60, "V": 500, "D": 64},
        *({"T": T, "V": VOCABULARY, "D": D} for D in (768, 1152) for T in (32_768, 8_192)),
    ],
    check_shapes={
        "cpu": {"T": 60, "V": 500, "D": 64},
        "cuda": {"T": 1_100, "V": 5_003, "D": 768},
    },
    regimes={"": {}, f"logits of deviation {SPREAD:.0f}": {"spread": SPREAD}},
    make=make,
    reference=reference,
    rivals={
        "eager": Rival(build=lambda: eager, min_bytes=logits_bytes(6, 12)),
        "compile": Rival(
            build=lambda: torch.compile(eager, dynamic=False), min_bytes=logits_bytes(2, 4)
        ),
        "torch": Rival(build=torch_fused),
        "liger": Rival(build=liger, module="liger_kernel", pip="liger-kernel", needs_cuda=True),
        "cut-cross-entropy": Rival(
            build=cut_cross_entropy,
            module="cut_cross_entropy",
            pip="cut-cross-entropy",
            needs_cuda=True,
        ),
        "quack": Rival(build=quack, module="quack", pip="quack-kernels", needs_cuda=True),
        "siglip2": ours(),
        "siglip2-small-chunks": ours(chunk_tokens=2_048),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-cublas": ours("cublas", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
    },
    cost=cost,
)
