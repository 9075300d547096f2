"""What kernels need to know of the lengths in a pack, made once a step on the host.

Every layer and both passes share it. It holds tensors and two sizes rounded up to powers of two,
so a compiled model meets few different ones; those of sequences of one length stay as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.varlen import cu_seqlens_from_lengths, tile_map

LEAST = 16  # rows of the smallest tile a tensor core takes
MOST = 128  # rows of a tile of queries
_TILES_MULTIPLE = 8  # of the power of two below: lists of tiles have eight lengths an octave


class VarlenPlan(NamedTuple):
    cu_seqlens: Tensor  # (B+1,) int32
    cu_seqlens_k: Tensor  # (B+1,) int32; that of the queries for self-attention
    max_seqlen: int  # rounded up, but where is_equal
    max_seqlen_k: int  # rounded up, but where is_equal
    tiles: Tensor  # (n, 2) int32: sequence, tile of its queries; longest first, then (-1, 0)
    order: Tensor  # (B,) int32: sequences, longest first
    # All sequences have max_seqlen queries and max_seqlen_k keys, neither of them rounded.
    is_equal: bool = False


class Layout(NamedTuple):
    """Where the queries and keys of each sequence lie: a plan, and how many rows of each count."""

    cu_seqlens: Tensor  # (B+1,) int32
    cu_seqlens_k: Tensor  # (B+1,) int32
    used: Tensor | None  # (B,) int32; None: all rows from one offset to the next
    used_k: Tensor | None  # (B,) int32
    lookahead: Tensor | None  # (B,) int32: later tokens that a token of a causal sequence reads
    tiles: Tensor  # (n, 2) int32
    order: Tensor  # (B,) int32
    max_seqlen: int
    max_seqlen_k: int
    is_equal: bool = False


def tile_rows(max_seqlen: int) -> int:
    """Queries of one program of the forward."""
    for rows in (LEAST, 32, 64):
        if max_seqlen <= rows:
            return rows
    return MOST


def make_plan(
    lengths: Sequence[int] | Tensor,  # (B,), on the host
    lengths_k: Sequence[int] | Tensor | None = None,  # (B,), on the host
    *,
    device: torch.device | str | None = None,
) -> VarlenPlan:
    """The plan of a pack with these lengths of queries, and of keys where they differ.

    Raises:
        ValueError: A length is wrong, or there is not one of keys for each of queries.
    """
    cu = cu_seqlens_from_lengths(lengths)
    cu_k = cu if lengths_k is None else cu_seqlens_from_lengths(lengths_k)
    if cu.shape != cu_k.shape:
        got = f"{cu.shape[0] - 1} and {cu_k.shape[0] - 1}"
        raise ValueError(f"need as many lengths of keys as of queries; got {got}")
    sizes, sizes_k = cu.diff(), cu_k.diff()
    is_equal = all(n.numel() and 0 < n.min() == n.max() for n in (sizes, sizes_k))
    longest, longest_k = (int(n.max()) if n.numel() else 0 for n in (sizes, sizes_k))
    if not is_equal:
        longest, longest_k = _bucket(longest), _bucket(longest_k)
    # Long sequences first: a long one that starts last would run alone.
    order = torch.argsort(sizes.long() * sizes_k, descending=True, stable=True)
    tiles = tile_map(cu, tile_rows(longest))
    rank = torch.argsort(order)
    tiles = _pad(tiles[torch.argsort(rank[tiles[:, 0].long()], stable=True)])
    cu, cu_k, tiles, order = (
        t.to(device, torch.int32, non_blocking=True) for t in (cu, cu_k, tiles, order)
    )
    if lengths_k is None:
        cu_k = cu
    return VarlenPlan(cu, cu_k, longest, longest_k, tiles, order, is_equal)


def uniform_plan(num: int, length: int, device: torch.device | str | None = None) -> VarlenPlan:
    """The plan of `num` sequences of one length, made on the device: nothing is copied to it."""
    cu_seqlens = torch.arange(num + 1, dtype=torch.int32, device=device) * length
    plan = unsorted_plan(cu_seqlens, cu_seqlens, length, length)
    return plan._replace(is_equal=num > 0 and length > 0)


def unsorted_plan(
    cu_seqlens: Tensor,  # (B+1,) int32
    cu_seqlens_k: Tensor,  # (B+1,) int32
    max_seqlen: int,
    max_seqlen_k: int,
) -> VarlenPlan:
    """For callers without a plan: made where `cu_seqlens` lives, with tiles that find no rows."""
    B, block = cu_seqlens.shape[0] - 1, tile_rows(max_seqlen)
    each = max((max_seqlen + block - 1) // block, 1)
    order = torch.arange(B, dtype=torch.int32, device=cu_seqlens.device)
    tile = torch.arange(each, dtype=torch.int32, device=cu_seqlens.device)
    tiles = torch.stack((order[:, None].expand(B, each), tile.expand(B, each)), dim=-1)
    return VarlenPlan(
        cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, tiles.flatten(0, 1), order
    )


def _bucket(longest: int) -> int:
    return max(LEAST, 1 << (longest - 1).bit_length()) if longest else LEAST


def _pad(tiles: Tensor) -> Tensor:
    """To one of few lengths; a program of sequence -1 ends at once."""
    n = tiles.shape[0]
    step = max(_TILES_MULTIPLE, (1 << n.bit_length()) // 2 // _TILES_MULTIPLE)
    padding = tiles.new_zeros(-n % step if n else step, 2)  # some program has to clear the output
    padding[:, 0] = -1
    return torch.cat((tiles, padding))
