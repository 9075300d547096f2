"""What `map_pool` accepts."""

import torch
from torch import Tensor

NAMES = ("probe", "q_weight", "q_bias", "kv_weight", "kv_bias")


def check(x: Tensor, cu_seqlens: Tensor, parameters: tuple[Tensor, ...], num_heads: int) -> None:
    """Raises ValueError."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"need x (T, D) of floats; got {tuple(x.shape)} {x.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype is not torch.int32 or not cu_seqlens.shape[0]:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"need cu_seqlens (B+1,) int32; got {got}")
    D = x.shape[1]
    if num_heads < 1 or D % num_heads:
        raise ValueError(f"need num_heads to divide D={D}; got {num_heads}")
    shapes = ((1, D), (D, D), (D,), (2 * D, D), (2 * D,))
    for name, w, shape in zip(NAMES, parameters, shapes, strict=True):
        if w.shape != shape or not w.is_floating_point():
            raise ValueError(f"need {name} {shape} of floats; got {tuple(w.shape)} {w.dtype}")
    for name, w in zip(("cu_seqlens", *NAMES), (cu_seqlens, *parameters), strict=True):
        if w.device != x.device:
            raise ValueError(f"need all tensors on x's device, {x.device}; {name} is on {w.device}")
