"""Specification of attention in a pack: softmax(q k^T scale) v, one sequence at a time."""

import torch
from torch import Tensor

from .._core.varlen import paired_bounds


def varlen_attention(
    q: Tensor,  # (T, H, E)
    k: Tensor,  # (S, H, E)
    v: Tensor,  # (S, H, E)
    cu_seqlens: Tensor,  # (B+1,)
    cu_seqlens_k: Tensor,  # (B+1,)
    used: Tensor | None = None,  # (B,)
    used_k: Tensor | None = None,  # (B,)
    lookahead: Tensor | None = None,  # (B,)
    *,
    causal: bool = False,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    """Weighted values and the scores' log-sum-exp; 0 and -inf in rows that no sequence has."""
    nothing = torch.ones((), dtype=torch.bool, device=q.device)
    out = q.masked_fill(nothing, 0)  # zeros that have a gradient, also in a pack without keys
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    bounds = paired_bounds(cu_seqlens, cu_seqlens_k, used, used_k)
    ahead = [0] * len(bounds) if lookahead is None else lookahead.tolist()
    for (first, last, first_k, last_k), more in zip(bounds, ahead, strict=True):
        if first == last or first_k == last_k:
            continue
        scores = torch.einsum("the,she->hts", q[first:last], k[first_k:last_k]) * scale
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1 + more)
            scores = scores.masked_fill(later, -torch.inf)
        p = torch.softmax(scores, dim=-1)
        out[first:last] = torch.einsum("hts,she->the", p, v[first_k:last_k])
        lse[:, first:last] = scores.logsumexp(-1)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))
