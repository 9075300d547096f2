"""Packed sequences: lengths to offsets, offsets to tiles; no other file does this arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


def cu_seqlens_from_lengths(
    lengths: Sequence[int] | Tensor,  # (B,), on the host; 0 is an empty sequence
    device: torch.device | str | None = None,
) -> Tensor:  # (B+1,) int32
    """Offsets such that sequence i is rows [cu[i], cu[i+1]).

    Raises:
        ValueError: Not one integer per sequence, a negative one, or a sum beyond int32.
    """
    lengths = _host(lengths, "lengths")
    if (lengths < 0).any():
        raise ValueError(f"need lengths >= 0; got {int(lengths.min())}")
    cu = torch.zeros(lengths.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=cu[1:])
    if int(cu[-1]) > INT32_MAX:
        raise ValueError(f"need at most {INT32_MAX} tokens in a pack; got {int(cu[-1])}")
    return cu.to(torch.int32).to(device, non_blocking=True)


def tile_map(
    cu_seqlens: Sequence[int] | Tensor,  # (B+1,), on the host
    block: int,
    device: torch.device | str | None = None,
) -> Tensor:  # (num_tiles, 2) int32
    """(sequence, tile within it) of each `block`-row tile; empty sequences have none.

    A kernel launched over this list starts no program without work, whatever the lengths.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0, or lives on a device (reading it would wait).
    """
    cu = _host(cu_seqlens, "cu_seqlens")
    if cu.shape[0] == 0 or cu[0] != 0 or (cu.diff() < 0).any():
        raise ValueError(f"need cu_seqlens to start at 0 and never fall; got {cu[:8].numpy()}...")
    num_tiles = (cu.diff() + block - 1) // block  # (B,)
    sequence = torch.repeat_interleave(torch.arange(num_tiles.shape[0]), num_tiles)
    first = num_tiles.cumsum(0) - num_tiles
    tile = torch.arange(sequence.shape[0]) - first[sequence]
    tiles = torch.stack((sequence, tile), dim=1)
    return tiles.to(torch.int32).to(device, non_blocking=True)


def length_groups(
    cu_seqlens: Tensor,  # (B+1,) int32, on the host
) -> list[tuple[int, Tensor, Tensor]]:  # length, (b,) sequences, (b, length) rows
    """The sequences of each length but 0: each group is one dense batch."""
    cu = _host(cu_seqlens, "cu_seqlens")
    lengths = cu.diff()
    groups = []
    for length in torch.unique(lengths[lengths > 0]).tolist():
        which = torch.nonzero(lengths == length)[:, 0]
        groups.append((length, which, cu[which][:, None] + torch.arange(length)))
    return groups


def used_bounds(
    cu_seqlens: Tensor,  # (B+1,) int32, on the host
    used: Tensor | None = None,  # (B,) int32, on the host: rows that count, from each first one
) -> Tensor:  # (B, 2) int64, on the host
    """[first, last) row of each sequence; `used` is clipped to the room a sequence has."""
    cu = _host(cu_seqlens, "cu_seqlens")
    if used is None:
        return torch.stack((cu[:-1], cu[1:]), dim=1)
    lengths = _host(used, "lengths").clamp(min=0).minimum(cu.diff())
    return torch.stack((cu[:-1], cu[:-1] + lengths), dim=1)


def paired_bounds(
    cu_seqlens: Tensor,  # (B+1,) int32
    cu_seqlens_k: Tensor,  # (B+1,) int32
    used: Tensor | None = None,  # (B,)
    used_k: Tensor | None = None,  # (B,)
) -> list[tuple[int, int, int, int]]:
    """[first, last) row of each sequence's queries, then of its keys; waits for a device."""
    host = [x if x is None else x.cpu() for x in (cu_seqlens, used, cu_seqlens_k, used_k)]
    return torch.cat((used_bounds(*host[:2]), used_bounds(*host[2:])), dim=1).tolist()


def paired_groups(
    cu_seqlens: Tensor,  # (B+1,) int32, on the host
    cu_seqlens_k: Tensor,  # (B+1,) int32, on the host
    used: Tensor | None = None,  # (B,)
    used_k: Tensor | None = None,  # (B,)
    lookahead: Tensor | None = None,  # (B,), on the host
) -> list[tuple[Tensor, Tensor, int]]:  # (b, length), (b, length_k) rows; their lookahead
    """Sequences alike in both lengths, neither of them 0, and lookahead: one dense batch a group.

    A lookahead is that of all sequences that see their last key from their first token.
    """
    bounds = used_bounds(cu_seqlens, used)
    # The pack's own keys, as in self-attention, need no second look.
    is_self = cu_seqlens_k is cu_seqlens and used_k is used
    bounds_k = bounds if is_self else used_bounds(cu_seqlens_k, used_k)
    lengths, lengths_k = bounds.diff()[:, 0], bounds_k.diff()[:, 0]
    pairs = (lengths << 32) + lengths_k  # sorted as numbers: rows take torch 30 times as long
    groups = []
    for pair in torch.unique(pairs[(lengths > 0) & (lengths_k > 0)]).tolist():
        alike = torch.nonzero(pairs == pair)[:, 0]
        length, length_k = pair >> 32, pair & (1 << 32) - 1
        for ahead, which in _by_lookahead(lookahead, alike, length_k):
            rows = bounds[which, :1] + torch.arange(length)
            rows_k = rows if is_self else bounds_k[which, :1] + torch.arange(length_k)
            groups.append((rows, rows_k, ahead))
    return groups


def _by_lookahead(
    lookahead: Tensor | None, which: Tensor, length_k: int
) -> list[tuple[int, Tensor]]:
    if lookahead is None:
        return [(0, which)]
    ahead = lookahead[which].clamp(0, length_k)
    return [(value, which[ahead == value]) for value in torch.unique(ahead).tolist()]


def _host(values: Sequence[int] | Tensor, name: str) -> Tensor:  # (n,) int64
    if not isinstance(values, Tensor):
        values = torch.tensor(values) if len(values) else torch.zeros(0, dtype=torch.int64)
    if values.device.type != "cpu":
        raise ValueError(f"need {name} on the host; got a tensor on {values.device}")
    if values.ndim != 1 or values.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(values.shape)} {values.dtype}"
        raise ValueError(f"need {name} of one dimension, int32 or int64; got {got}")
    return values.to(torch.int64)
