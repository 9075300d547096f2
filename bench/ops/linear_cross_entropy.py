"""A caption head: T tokens against a vocabulary of V words, model width D."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

from ..case import APPROXIMATE, Case, Cost, Mode, Rival

V = 256_000  # the multilingual tokenizer's
CHUNK_TOKENS = 4096  # torch's own rule picks 32 to 128 here, each with a pass over all of dweight
SMALL_CHUNK_TOKENS = 2048


def make(
    *,
    T: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    std: float = 1.0,
) -> list[Tensor]:  # (T, D), (V, D), (T,)
    """Logits of this standard deviation; every token counts."""
    draw = partial(torch.randn, device=device, generator=generator, dtype=dtype)
    x, weight = draw(T, D), draw(V, D).mul_(std / D**0.5)
    target = torch.randint(0, V, (T,), device=device, generator=generator)
    return [x.requires_grad_(), weight.requires_grad_(), target]


def eager(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
) -> Tensor:  # ()
    """As language models' code has it: the product in the inputs' dtype, the rest in float32."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def liger(
    chunk_tokens: int | None = None, accum_dtype: torch.dtype | None = None
) -> Callable[..., Tensor]:
    """`chunk_tokens` None: its own choice, T D elements of logits at a time."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        (T, D), V = x.shape, weight.shape[0]
        # Liger takes a factor on T D elements and cuts T into V / (factor D) chunks.
        factor = 1 if chunk_tokens is None else -(-V // (D * -(-T // chunk_tokens)))
        options = {"accum_dtype": accum_dtype, "chunk_mem_const": factor}
        return liger_fused_linear_cross_entropy(x, weight, target, **options)

    return run


def liger_hopper() -> Callable[..., Tensor]:
    """Its product with the softmax inside, and a backward in waves of 1024 tokens."""
    if find_spec("cutlass") is None:
        raise NotImplementedError("needs the package nvidia-cutlass-dsl")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    fused = LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda x, weight, target: fused(x, weight, target).sum() / x.shape[0]


def cut_cross_entropy(**options: None) -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy as cce

    return partial(cce, **options)


def torch_chunked(**options: int | str | None) -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return partial(F.linear_cross_entropy, options=chosen)


def quack(**options: int) -> Callable[..., Tensor]:
    """On Hopper its scaled-exp pipeline, in chunks of 4096 tokens unless asked otherwise."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return partial(chunked_linear_cross_entropy, **options)


def bytes_a_logit(forward: float, full: float) -> Callable[..., float]:
    """Least memory of an implementation that holds something for each of the T x V logits."""

    def min_bytes(mode: Mode, *, T: int, V: int, D: int, dtype: torch.dtype) -> float:
        return T * V * (forward if mode == "forward" else full)

    return min_bytes


def float32_weight_gradient(mode: Mode, *, T: int, V: int, D: int) -> float:
    """Of a rival that sums the weight's gradient there before it is rounded."""
    return 0.0 if mode == "forward" else 4.0 * V * D


def cost(*, T: int, V: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    matrices_bytes = (T + V) * D * dtype.itemsize
    return {
        "forward": Cost(flops=2 * T * V * D, num_bytes=matrices_bytes),
        "full": Cost(flops=6 * T * V * D, num_bytes=2 * matrices_bytes),
    }


def ours(
    backend: str | None = None, *, needs_cuda: bool = False, chunk_tokens: int | None = None
) -> Rival:
    options = {"backend": backend, "chunk_tokens": chunk_tokens}
    return Rival(
        build=lambda: partial(linear_cross_entropy, **options),
        needs_cuda=needs_cuda,
        is_ours=True,
        accumulator_bytes=float32_weight_gradient,
    )


# Liger and CCE add up the weight's gradient in bfloat16 unless asked otherwise, and CCE leaves
# small terms out: as they are used, and timed so.
_LIGER = {"module": "liger_kernel", "pip": "liger-kernel", "needs_cuda": True}
_CCE = {"module": "cut_cross_entropy", "pip": "cut-cross-entropy", "needs_cuda": True}
_CCE |= {"max_error": APPROXIMATE}
_QUACK = {"module": "quack", "pip": "quack-kernels", "needs_cuda": True}
_QUACK |= {"accumulator_bytes": float32_weight_gradient}

# Bytes a logit of eager, by what must live at a time: float32 logits and log-softmax, in the
# backward log-softmax, its gradient and that of the logits. compile keeps the product, and in the
# backward its gradient.
CASE = Case(
    x_name="T",
    x_label="tokens",
    shapes=[
        {"T": 64, "V": 1000, "D": 64},
        *({"T": T, "V": V, "D": D} for T in (32_768, 8192) for D in (768, 1152)),
    ],
    # T is no multiple of a tile or chunk. V on a GPU is what QuACK's fast path takes, and 256,000
    # is: it divides by 256 and not by 192. The op's own tests have V that divide by nothing.
    check_shapes={
        "cpu": {"T": 200, "V": 517, "D": 64},
        "cuda": {"T": CHUNK_TOKENS + 296, "V": 32_000, "D": 768},
    },
    regimes={"logits of std 1": {"std": 1.0}, "logits of std 8": {"std": 8.0}},
    make=make,
    reference=reference,
    rivals={
        "eager": Rival(build=lambda: eager, min_bytes=bytes_a_logit(8, 12)),
        "compile": Rival(
            build=lambda: torch.compile(eager, dynamic=False), min_bytes=bytes_a_logit(2, 4)
        ),
        "siglip2": ours(),
        "siglip2-2048": ours(chunk_tokens=SMALL_CHUNK_TOKENS),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-cublas": ours("cublas", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
        "quack": Rival(build=quack, **_QUACK),
        "quack-8192": Rival(build=partial(quack, chunk_size=2 * CHUNK_TOKENS), **_QUACK),
        "liger-hopper": Rival(build=liger_hopper, max_error=APPROXIMATE, **_LIGER),
        "liger": Rival(build=liger, max_error=APPROXIMATE, **_LIGER),
        "liger-fp32-4096": Rival(
            build=partial(liger, CHUNK_TOKENS, torch.float32),
            accumulator_bytes=float32_weight_gradient,
            **_LIGER,
        ),
        "cut-cross-entropy": Rival(build=cut_cross_entropy, **_CCE),
        "cut-cross-entropy-exact": Rival(build=partial(cut_cross_entropy, filter_eps=None), **_CCE),
        "torch-chunked": Rival(build=torch_chunked),
        "torch-chunked-4096": Rival(
            build=partial(torch_chunked, batch_chunk_size=CHUNK_TOKENS, chunking_method=None)
        ),
    },
    cost=cost,
)
