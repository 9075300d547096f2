"""cuDNN's attention as torch carries it, for sequences of one length: they are one dense batch.

By torch's account its backward is not deterministic, so it runs where it is asked for by name only.
cuDNN makes its kernel at the first call for each (B, N), on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Layout

HAS_CUDNN = torch.backends.cudnn.is_available()


def unsupported(q: Tensor, layout: Layout, causal: bool) -> str | None:
    if q.device.type != "cuda":
        return f"needs a CUDA tensor, got {q.device}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(q.device) < (9, 0):
        return "needs an NVIDIA GPU of compute capability 9.0 or later"
    if not HAS_CUDNN:
        return "needs a torch with cuDNN"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > 128:
        return f"needs a head width divisible by 8, up to 128; got {q.shape[2]}"
    if layout.lookahead is not None:
        return "has one causal mask for all sequences"
    if causal and layout.cu_seqlens_k is not layout.cu_seqlens:
        return "aligns a causal mask in its own way where keys have their own lengths"
    if not layout.is_equal:
        return "needs a plan of sequences of one length"
    if layout.max_seqlen == 1 or layout.max_seqlen_k == 1:
        return "needs sequences of more than one token"
    B = layout.cu_seqlens.shape[0] - 1
    if q.shape[0] != B * layout.max_seqlen or B > 65_535:
        return "needs at most 65,535 sequences, and no tokens behind the last"
    return None


def _dense(x: Tensor, B: int, N: int) -> Tensor:
    """(B, H, N, E): a view of the first B N rows, all that sequences have."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return x[: B * N].unflatten(0, (B, N)).transpose(1, 2)


def _dense_qkv(qkv: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    sizes = (layout.max_seqlen, layout.max_seqlen_k, layout.max_seqlen_k)
    B = layout.cu_seqlens.shape[0] - 1
    return [_dense(x, B, N) for x, N in zip(qkv, sizes, strict=True)]


def fwd(
    qkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E)
    layout: Layout,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_dense_qkv(qkv, layout), None, True, 0.0, causal, False, scale=scale
    )
    lse = lse.reshape(out.shape[:3]).transpose(0, 1)  # (H, B, N)
    return out.transpose(1, 2).flatten(0, 1).contiguous(), lse.flatten(1).contiguous()


def bwd(
    dout: Tensor,  # (T, H, E)
    qkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E)
    out: Tensor,  # (T, H, E)
    lse: Tensor,  # (H, T)
    dqkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E): written
    layout: Layout,
    causal: bool,
    scale: float,
) -> None:
    B, N, M = layout.cu_seqlens.shape[0] - 1, layout.max_seqlen, layout.max_seqlen_k
    inputs = (_dense(dout, B, N), *_dense_qkv(qkv, layout), _dense(out, B, N))
    stats = lse.unflatten(1, (B, N)).transpose(0, 1).contiguous()[..., None]  # (B, H, N, 1)
    # Dropout's seed and offset, of which there are none; no bias; no offsets of sequences.
    seed = torch.zeros((), dtype=torch.int64, device=dout.device)
    rest = (seed, seed, None, None, None, N, M, 0.0, causal)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *inputs, stats, *rest, scale=scale
    )
    for d, grad in zip(dqkv, grads, strict=True):
        rows = grad.transpose(1, 2).flatten(0, 1)
        d[: rows.shape[0]].copy_(rows)
        d[rows.shape[0] :].zero_()
