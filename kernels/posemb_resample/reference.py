"""Specification of the position table's resampling: eager PyTorch, autograd, any float dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .weights import axis_weights


def posemb_resample(
    table: Tensor,  # (G, G, D)
    grid_hw: Sequence[tuple[int, int]],  # patches down and across, of each image
) -> Tensor:  # (T, D)
    """Rows of image after image, row-major: F.interpolate(bilinear, antialias, half pixels)."""
    rows = [table[:0].flatten(0, 1)]  # no image: still a result of the table
    for h, w in grid_hw:
        down, across = (axis_weights(n, table.shape[0], table.dtype, table.device) for n in (h, w))
        rows.append(torch.einsum("hg,gkd,wk->hwd", down, table, across).flatten(0, 1))
    return torch.cat(rows)
