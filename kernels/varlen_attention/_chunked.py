"""Eager backend on the CPU: sequences of one length are one dense batch of torch's own attention.

The lengths are read on the host. Torch's kernels tile the scores, so no (n, n) matrix is held, and
return the log-sum-exp that their backward takes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.varlen import paired_groups
from .plan import Layout

_dense_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_dense_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported(q: Tensor, layout: Layout, causal: bool) -> str | None:
    if q.device.type != "cpu":
        return f"runs torch's CPU kernels with lengths read on the host, got {q.device}"
    return None


def _groups(layout: Layout) -> list[tuple[Tensor, Tensor, int]]:
    return paired_groups(*layout[:5])


def _masked(rows: Tensor, rows_k: Tensor, causal: bool, ahead: int, dtype: torch.dtype) -> dict:
    """`is_causal` and `attn_mask` of torch's kernels."""
    n, n_k = rows.shape[1], rows_k.shape[1]
    if not causal or ahead >= n_k:
        return {"is_causal": False}
    if ahead == 0:
        return {"is_causal": True}
    later = torch.ones(n, n_k, dtype=torch.bool).triu(1 + ahead)
    mask = torch.zeros(n, n_k, dtype=dtype).masked_fill(later, -torch.inf)
    return {"is_causal": False, "attn_mask": mask}


def _dense(x: Tensor, rows: Tensor) -> Tensor:  # (b, H, n, E)
    """A group's rows; a view where that group is the whole pack, whose rows rise by 1."""
    is_whole = rows.numel() == x.shape[0]
    return (x.unflatten(0, rows.shape) if is_whole else x[rows]).transpose(1, 2)


def fwd(
    qkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E)
    layout: Layout,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    q, k, v = qkv
    T, H, E = q.shape
    out = q.new_zeros(T, H, E)
    lse = q.new_full((T, H), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, rows_k, ahead in _groups(layout):
        mask = _masked(rows, rows_k, causal, ahead, q.dtype)
        dense = (_dense(q, rows), _dense(k, rows_k), _dense(v, rows_k))
        part, part_lse = _dense_fwd(*dense, 0.0, **mask, scale=scale)
        out[rows], lse[rows] = part.transpose(1, 2), part_lse.transpose(1, 2)
    return out, lse.T.contiguous()


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
    q, k, v = qkv
    for d in dqkv:
        d.zero_()
    for rows, rows_k, ahead in _groups(layout):
        mask = _masked(rows, rows_k, causal, ahead, q.dtype)
        inputs = (_dense(q, rows), _dense(k, rows_k), _dense(v, rows_k))
        outputs = (_dense(out, rows), _dense(lse.T[:, :, None], rows)[..., 0])
        parts = _dense_bwd(_dense(dout, rows), *inputs, *outputs, 0.0, **mask, scale=scale)
        for d, part, at in zip(dqkv, parts, (rows, rows_k, rows_k), strict=True):
            d[at] = part.transpose(1, 2)
