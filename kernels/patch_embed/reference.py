"""Specification of the patch embedding: eager PyTorch, autograd, any float dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    patches: Tensor,  # (T, P*P*C) uint8 or float
    weight: Tensor,  # (D, P*P*C)
    bias: Tensor,  # (D,)
    *,
    dtype: torch.dtype,
    posemb: Tensor | None = None,  # (T, D)
    mask: Tensor | None = None,  # (T,) bool
    mask_token: Tensor | None = None,  # (D,)
) -> Tensor:  # (T, D)
    """Bytes mean x / 127.5 - 1; masked patches become `mask_token` before the position is added."""
    x = patches.to(dtype)
    if patches.dtype is torch.uint8:
        x = x / 127.5 - 1
    y = F.linear(x, weight.to(dtype), bias.to(dtype))
    if mask is not None:
        y = torch.where(mask[:, None], mask_token.to(dtype), y)
    return y if posemb is None else y + posemb.to(dtype)
