"""Attention inside B packed sequences; a head's shapes are those of the SigLIP 2 towers."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import VarlenPlan, make_plan, varlen_qkv_attention
from siglip2_kernels.varlen_attention.reference import varlen_attention as specification

from ..case import Case, Cost, Rival

TOKENS = 65_536  # of the measured packs
# Patches of photos at a budget of 1,024, 576, 256 and 128, and 6 x 6 local crops: a mixed batch.
MIX = (999, 1015, 560, 551, 247, 252, 256, 120, 128, 36, 36, 36)


def lengths_of(B: int, N: int) -> list[int]:
    """B sequences of N tokens; N = 0 means lengths of `MIX` in turn."""
    return [N or MIX[i % len(MIX)] for i in range(B)]


def make(
    *,
    B: int,
    N: int,
    H: int,
    E: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> list:
    """qkv (T, 3, H, E), its plan, its lengths on the host and as a mask (B, longest)."""
    lengths = lengths_of(B, N)
    qkv = torch.randn(sum(lengths), 3, H, E, device=device, generator=generator).to(dtype)
    plan = make_plan(lengths, device=device)
    sizes = plan.cu_seqlens.diff()
    valid = torch.arange(max(lengths), device=device) < sizes[:, None]
    return [qkv.requires_grad_(), plan, tuple(lengths), valid]


def reference(qkv: Tensor, plan: VarlenPlan, lengths: tuple[int, ...], valid: Tensor) -> Tensor:
    scale = qkv.shape[3] ** -0.5
    bounds = (plan.cu_seqlens, plan.cu_seqlens)
    return specification(*qkv.unbind(1), *bounds, causal=False, scale=scale)[0]


def _padded(x: Tensor, valid: Tensor) -> Tensor:  # (T, 3, H, E) -> (B, longest, 3, H, E)
    padded = x.new_zeros(*valid.shape, *x.shape[1:])
    return padded.index_put((valid,), x)


def dense(*, with_mask: bool) -> Callable[..., Tensor]:
    """SDPA over padded sequences. The mask is what transformers' Siglip2 makes of lengths."""

    def run(qkv: Tensor, plan: VarlenPlan, lengths: tuple[int, ...], valid: Tensor) -> Tensor:
        B, N = valid.shape
        is_uniform = len(set(lengths)) == 1
        if not (is_uniform or with_mask):
            raise NotImplementedError("without a mask padding would be read: lengths differ")
        x = qkv.unflatten(0, (B, N)) if is_uniform else _padded(qkv, valid)
        q, k, v = x.permute(2, 0, 3, 1, 4)  # (B, H, N, E)
        mask = valid[:, None, None].expand(B, 1, N, N) if with_mask else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return out.flatten(0, 1) if is_uniform else out[valid]

    return run


def torch_varlen() -> Callable[..., Tensor]:
    """FlashAttention 2 as torch carries it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise NotImplementedError("this torch has no torch.nn.attention.varlen") from None

    def run(qkv: Tensor, plan: VarlenPlan, lengths: tuple[int, ...], valid: Tensor) -> Tensor:
        cu, longest = plan.cu_seqlens, valid.shape[1]
        return varlen_attn(*qkv.unbind(1), cu, cu, longest, longest)

    return run


def flash_attn_4() -> Callable[..., Tensor]:
    from flash_attn.cute import flash_attn_varlen_func

    def run(qkv: Tensor, plan: VarlenPlan, lengths: tuple[int, ...], valid: Tensor) -> Tensor:
        cu, longest = plan.cu_seqlens, valid.shape[1]
        out = flash_attn_varlen_func(
            *qkv.unbind(1),
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
        )
        return out[0] if isinstance(out, tuple) else out

    return run


@lru_cache(maxsize=8)
def _document_mask(lengths: tuple[int, ...], device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    T = sum(lengths)
    same = lambda b, h, i, j: document[i] == document[j]
    return create_block_mask(same, None, None, T, T, device=device)


def flex() -> Callable[..., Tensor]:
    """Compiled FlexAttention with a document mask, which is made once, outside the timed call."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def run(qkv: Tensor, plan: VarlenPlan, lengths: tuple[int, ...], valid: Tensor) -> Tensor:
        mask = _document_mask(lengths, qkv.device)
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # (1, H, T, E)
        return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return run


def cudnn() -> Callable[..., Tensor]:
    """cuDNN's SDPA through torch, which has it for sequences of one length only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = dense(with_mask=False)

    def run(*inputs) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(*inputs)

    return run


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def run(qkv: Tensor, plan: VarlenPlan, lengths: tuple[int, ...], valid: Tensor) -> Tensor:
        return varlen_qkv_attention(
            qkv, plan.cu_seqlens, plan.max_seqlen, plan=plan, backend=backend
        )

    return Rival(build=lambda: run, needs_cuda=needs_cuda, is_ours=True)


def cost(*, B: int, N: int, H: int, E: int, dtype: torch.dtype) -> dict[str, Cost]:
    """Useful FLOPs: padding counts nothing. Bytes: q, k, v, out, and in the backward all four twice
    (out and its gradient read, three gradients written)."""
    lengths = lengths_of(B, N)
    pairs, row = sum(n * n for n in lengths), H * E * dtype.itemsize
    T = sum(lengths)
    forward = Cost(flops=4 * H * E * pairs, num_bytes=4 * T * row)
    backward = Cost(flops=10 * H * E * pairs, num_bytes=8 * T * row)
    full = Cost(flops=14 * H * E * pairs, num_bytes=12 * T * row)
    return {"forward": forward, "backward": backward, "full": full}


_LENGTHS = (256, 1024, 0, 64, 576, 128, 36, 784)  # those of the promises first
_HEADS = ((16, 72), (12, 64))  # So400m/16, B/16


def _shapes() -> list[dict[str, int]]:
    shapes = [{"B": 4, "N": 20, "H": 2, "E": 64}]
    for N in _LENGTHS:
        B = TOKENS // N if N else 180
        shapes += [{"B": B, "N": N, "H": H, "E": E} for H, E in _HEADS]
    return [*shapes, {"B": 256, "N": 256, "H": 16, "E": 96}]  # g-opt


CASE = Case(
    x_name="N",
    x_label="tokens a sequence (0: a mix from 36 to 1,015)",
    shapes=_shapes(),
    # Of one length, which every rival takes; the tests of the op are on ragged packs.
    check_shapes={
        "cpu": {"B": 5, "N": 37, "H": 2, "E": 72},
        "cuda": {"B": 24, "N": 247, "H": 4, "E": 72},
    },
    modes=("forward", "backward"),
    make=make,
    reference=reference,
    rivals={
        "sdpa-mask": Rival(build=partial(dense, with_mask=True)),
        "sdpa": Rival(build=partial(dense, with_mask=False)),
        "varlen_attn": Rival(build=torch_varlen, needs_cuda=True),
        "flash-attn-4": Rival(
            build=flash_attn_4, module="flash_attn", pip="flash-attn-4", needs_cuda=True
        ),
        "flex": Rival(build=flex, needs_cuda=True),
        "cudnn": Rival(build=cudnn, needs_cuda=True),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
    },
    cost=cost,
)
