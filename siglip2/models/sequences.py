"""Where each sequence lies in a packed (T, D) tensor, and attention inside those bounds."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Group(NamedTuple):
    """The sequences of one length."""

    which: Tensor  # (b,) int64: their numbers
    rows: Tensor  # (b * length,) int64: their tokens


class Sequences(NamedTuple):
    """Bounds of packed sequences, made once a step and shared by every layer.

    `groups` lets sequences of one length attend as one dense batch; it is empty when all are equal.
    """

    cu_seqlens: Tensor  # (B+1,) int32, device
    max_seqlen: int
    lengths: tuple[int, ...]  # host copy
    groups: tuple[Group, ...] = ()

    @property
    def is_uniform(self) -> bool:
        return not self.groups

    @property
    def last(self) -> Tensor:  # (B,) row of each sequence's last token
        return self.cu_seqlens[1:].long() - 1


def uniform(num: int, length: int, device: torch.device) -> Sequences:
    """`num` sequences of one length."""
    cu_seqlens = torch.arange(num + 1, device=device, dtype=torch.int32) * length
    return Sequences(cu_seqlens, length, (length,) * num)


def ragged(lengths: Sequence[int], device: torch.device) -> Sequences:
    """Sequences of any lengths, zero included."""
    if len(set(lengths)) <= 1:
        return uniform(len(lengths), lengths[0] if lengths else 0, device)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    cu_seqlens = F.pad(sizes.cumsum(0), (1, 0)).to(device, torch.int32)
    groups = []
    for length in sorted(set(lengths) - {0}):
        which = torch.tensor([i for i, n in enumerate(lengths) if n == length])
        rows = (starts[which][:, None] + torch.arange(length)).flatten()
        groups.append(Group(which.to(device), rows.to(device)))
    return Sequences(cu_seqlens, max(lengths), tuple(lengths), tuple(groups))


def attention(
    q: Tensor,  # (T, H, E)
    k: Tensor,  # (T, H, E)
    v: Tensor,  # (T, H, E)
    seqs: Sequences,
) -> Tensor:  # (T, H, E)
    """Bidirectional self-attention inside each sequence, scaled by 1/sqrt(E)."""
    if seqs.is_uniform:
        return _dense(q, k, v, len(seqs.lengths))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = seqs.cu_seqlens, seqs.max_seqlen
        return varlen_attn(q, k, v, cu, cu, longest, longest)
    out = torch.zeros_like(q)
    for which, rows in seqs.groups:
        out = out.index_copy(0, rows, _dense(q[rows], k[rows], v[rows], len(which)))
    return out


def pool_attention(
    q: Tensor,  # (H, E), one query for all
    k: Tensor,  # (T, H, E)
    v: Tensor,  # (T, H, E)
    seqs: Sequences,
) -> Tensor:  # (B, H, E)
    """What one shared query reads from each sequence; zeros for an empty one."""
    if seqs.is_uniform:
        return _dense_pool(q, k, v, len(seqs.lengths))
    out = k.new_zeros(len(seqs.lengths), *q.shape)
    for which, rows in seqs.groups:
        out = out.index_copy(0, which, _dense_pool(q, k[rows], v[rows], len(which)))
    return out


def _dense(q: Tensor, k: Tensor, v: Tensor, num: int) -> Tensor:
    if q.shape[0] == 0:
        return q
    q, k, v = (x.unflatten(0, (num, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, E)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _dense_pool(q: Tensor, k: Tensor, v: Tensor, num: int) -> Tensor:
    if k.shape[0] == 0:
        return k.new_zeros(num, *q.shape)
    k, v = (x.unflatten(0, (num, -1)).transpose(1, 2) for x in (k, v))  # (B, H, N, E)
    q = q[:, None].expand(num, -1, -1, -1)  # (B, H, 1, E)
    return F.scaled_dot_product_attention(q, k, v)[:, :, 0]
