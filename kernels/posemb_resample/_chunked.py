"""Eager backend: each distinct grid is made once, then copied to its images. Any device.

The grids are read on the host: on a GPU, where they live there, that waits.
"""

import torch
from torch import Tensor

from .weights import axis_weights


def unsupported(table: Tensor, grid_hw: Tensor) -> str | None:
    if grid_hw.device.type != "cpu":
        return "reads grid_hw on the host; pass it as a CPU tensor"
    return None


def _distinct(
    grid_hw: Tensor,
) -> tuple[list[tuple[int, int]], Tensor]:  # grids that have patches, (B',) which
    grid_hw = grid_hw[grid_hw.prod(1) > 0]
    grids, which = torch.unique(grid_hw, dim=0, return_inverse=True)
    return [(h, w) for h, w in grids.tolist()], which


def _axes(h: int, w: int, table: Tensor) -> tuple[Tensor, Tensor]:  # (h, G), (w, G)
    return tuple(axis_weights(n, table.shape[0], table.dtype, table.device) for n in (h, w))


def _rows(grid_hw: Tensor) -> tuple[list[int], list[int]]:  # (B',) first row, rows
    counts = grid_hw.long().prod(1)
    counts = counts[counts > 0]
    return (counts.cumsum(0) - counts).tolist(), counts.tolist()


def fwd(table: Tensor, grid_hw: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:  # (T, D)
    out = table.new_empty(num_tokens, table.shape[2], dtype=dtype)
    grids, which = _distinct(grid_hw)
    made = []
    for h, w in grids:
        down, across = _axes(h, w, table)
        columns = torch.einsum("gkd,wk->gwd", table, across)
        made.append((down @ columns.flatten(1)).view(h * w, -1).to(dtype))
    firsts, counts = _rows(grid_hw)
    for first, count, i in zip(firsts, counts, which.tolist(), strict=True):
        out[first : first + count] = made[i]
    return out


def bwd(dout: Tensor, grid_hw: Tensor, table: Tensor) -> Tensor:  # (G, G, D) of the table's dtype
    dtable = torch.zeros_like(table)
    grids, which = _distinct(grid_hw)
    sums = [table.new_zeros(h * w, table.shape[2]) for h, w in grids]
    firsts, counts = _rows(grid_hw)
    for first, count, i in zip(firsts, counts, which.tolist(), strict=True):
        sums[i] += dout[first : first + count]
    for (h, w), total in zip(grids, sums, strict=True):
        down, across = _axes(h, w, table)
        columns = (down.T @ total.view(h, -1)).view(table.shape[0], w, -1)
        dtable += torch.einsum("gwd,wk->gkd", columns, across)
    return dtable
