"""Specification of attention pooling: the MAP head as written, one sequence at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def map_pool(
    x: Tensor,  # (T, D)
    cu_seqlens: Tensor,  # (B+1,)
    probe: Tensor,  # (1, D)
    q_weight: Tensor,  # (D, D)
    q_bias: Tensor,  # (D,)
    kv_weight: Tensor,  # (2 * D, D)
    kv_bias: Tensor,  # (2 * D,)
    *,
    num_heads: int,
) -> Tensor:  # (B, D)
    """What the probe reads from each sequence, heads joined; zeros for an empty one."""
    weights = (w.to(x.dtype) for w in (probe, q_weight, q_bias, kv_weight, kv_bias))
    probe, q_weight, q_bias, kv_weight, kv_bias = weights
    q = F.linear(probe, q_weight, q_bias).view(num_heads, -1)  # (H, E)
    k, v = F.linear(x, kv_weight, kv_bias).unflatten(1, (2, num_heads, -1)).unbind(1)
    rows = []
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("he,nhe->hn", q, k[first:last]) / q.shape[1] ** 0.5
        p = torch.softmax(scores, dim=1)  # (H, n)
        rows.append(torch.einsum("hn,nhe->he", p, v[first:last]).flatten())
    return torch.stack(rows) if rows else v[:0].flatten(1)
