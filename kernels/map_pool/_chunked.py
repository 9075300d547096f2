"""Eager backend: sequences of one length are one dense batch. Their sizes are read on the host.

Scores and weights are float32; what is read of tokens is summed in float32.
"""

import torch
from torch import Tensor

from .._core.matmul import mm_f32
from .._core.varlen import length_groups


def unsupported(x: Tensor, u: Tensor, cu_seqlens: Tensor) -> str | None:
    if cu_seqlens.device.type != "cpu":
        return f"reads cu_seqlens on the host, got {cu_seqlens.device}"
    return None


def _dense(x: Tensor, rows: Tensor) -> Tensor:  # (b, n, ...)
    """A group's rows; a view when all sequences have one length."""
    if rows.numel() == x.shape[0]:
        return x.view(*rows.shape, *x.shape[1:])
    return x[rows]


def fwd(
    x: Tensor,  # (T, D)
    u: Tensor,  # (H, D)
    cu_seqlens: Tensor,  # (B+1,)
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, D), (T, H), (B, H)
    """Mean tokens under softmax(x u^T), the scores, and their log-sum-exp; 0 when empty."""
    B = cu_seqlens.shape[0] - 1
    s = mm_f32(x, u.to(x.dtype).T)
    m, lse = s.new_zeros(B, *u.shape), s.new_zeros(B, u.shape[0])
    for _, which, rows in length_groups(cu_seqlens):
        scores = _dense(s, rows)  # (b, n, H)
        lse[which] = scores.logsumexp(1)
        p = torch.softmax(scores, dim=1).transpose(1, 2)
        m[which] = p @ _dense(x, rows).to(p.dtype)
    return m, s, lse


def bwd(
    dm: Tensor,  # (B, H, D)
    x: Tensor,  # (T, D)
    u: Tensor,  # (H, D)
    m: Tensor,  # (B, H, D)
    s: Tensor,  # (T, H)
    lse: Tensor,  # (B, H)
    cu_seqlens: Tensor,  # (B+1,)
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:  # (T, D), (H, D)
    dx, du = torch.zeros_like(x), torch.zeros_like(u)
    delta = (m * dm).sum(-1)  # (B, H) = sum_n p dp
    for _, which, rows in length_groups(cu_seqlens):
        tokens = _dense(x, rows).to(dm.dtype)  # (b, n, D)
        p = torch.exp(_dense(s, rows) - lse[which][:, None])  # (b, n, H)
        dp = tokens @ dm[which].transpose(1, 2)
        ds = p * (dp - delta[which][:, None])
        dx[rows] = (p @ dm[which] + ds @ u).to(x.dtype)
        du += ds.flatten(0, 1).T @ tokens.flatten(0, 1)
    return dx, du
