"""Antialiased bilinear weights of one axis, as F.interpolate(antialias=True) defines them."""

import torch
from torch import Tensor


def axis_weights(
    num: int,  # cells to make
    size: int,  # cells there are
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # (num, size), rows sum to 1
    """Triangles around half-pixel centres, as wide as a cell of the coarser of the two grids."""
    scale = size / max(num, 1)
    centre = (torch.arange(num, dtype=torch.float64) + 0.5) * scale
    cell = torch.arange(size, dtype=torch.float64) + 0.5
    weights = (1 - (cell - centre[:, None]).abs() / max(scale, 1.0)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(device, dtype)
