"""torch's own FlashAttention (what `torch.nn.attention.varlen` calls), for long sequences.

A function of torch picks the version: `torch.nn.attention.activate_flash_attention_impl`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.backend import has_triton
from .plan import Layout


def unsupported(q: Tensor, layout: Layout, causal: bool) -> str | None:
    if q.device.type != "cuda":
        return f"needs a CUDA tensor, got {q.device}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or later"
    if not has_triton():
        return "needs the package 'triton' (pip install triton)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > 256:
        return f"needs a head width divisible by 8, up to 256; got {q.shape[2]}"
    if layout.used is not None:
        return "takes packed sequences, not padded ones"
    if layout.lookahead is not None:
        return "has one causal mask for all sequences"
    if causal and layout.cu_seqlens_k is not layout.cu_seqlens:
        return "aligns a causal mask at the end, which differs where keys have their own lengths"
    return None


def fwd(
    qkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E)
    layout: Layout,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    bounds = (layout.cu_seqlens, layout.cu_seqlens_k, layout.max_seqlen, layout.max_seqlen_k)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *qkv, *bounds, 0.0, causal, False, scale=scale
    )
    from ._rows_triton import clear_past

    out = out.contiguous()  # it has the layout of q
    clear_past(out, lse, layout.cu_seqlens)
    return out, lse


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
    bounds = (layout.cu_seqlens, layout.cu_seqlens_k, layout.max_seqlen, layout.max_seqlen_k)
    # Dropout's state, of which there is none.
    state = torch.zeros(2, dtype=torch.uint64, device=dout.device)
    grads = torch.ops.aten._flash_attention_backward(
        dout, *qkv, out, lse, *bounds, 0.0, causal, state, state.new_empty(0), scale=scale
    )
    from ._rows_triton import place

    for d, grad, cu in zip(dqkv, grads, (bounds[0], bounds[1], bounds[1]), strict=True):
        place(grad.contiguous(), d, cu)
