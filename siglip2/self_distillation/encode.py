"""Several batches of images in one pass of a tower."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.inputs import VisionInputs
from ..models.sequences import ragged
from ..models.vision import VisionOutput, VisionTower


class View(NamedTuple):
    inputs: VisionInputs
    mask: Tensor | None = None  # (T,) bool


def encode(
    tower: VisionTower,
    views: Sequence[View],
    dtype: torch.dtype,
    mask_token: Tensor | None = None,  # (D,) what masked patches become
) -> list[VisionOutput]:
    """What the tower says of each of `views`, which it sees as one packed batch."""
    if len(views) == 1:
        [(inputs, mask)] = views
        token = None if mask is None else mask_token
        return [tower(*inputs, dtype, mask=mask, mask_token=token)]
    grids = [inputs.grid_hw.tolist() for inputs, _ in views]
    tokens = [len(inputs.patches) for inputs, _ in views]
    patches = [inputs.patches for inputs, _ in views]
    if len({x.dtype for x in patches}) > 1:
        patches = [_floats(x) for x in patches]
    grid_hw = torch.tensor([size for grid in grids for size in grid], dtype=torch.int32).view(-1, 2)
    seqs = ragged([h * w for grid in grids for h, w in grid], patches[0].device)
    mask = None
    if any(mask is not None for _, mask in views):
        mask = torch.cat(
            [
                inputs.patches.new_zeros(n, dtype=torch.bool) if mask is None else mask
                for (inputs, mask), n in zip(views, tokens, strict=True)
            ]
        )
    token = None if mask is None else mask_token
    out = tower(torch.cat(patches), grid_hw, seqs, dtype, mask=mask, mask_token=token)
    parts = out.tokens.split(tokens), out.pooled.split([len(grid) for grid in grids])
    return [VisionOutput(*part) for part in zip(*parts, strict=True)]


def _floats(patches: Tensor) -> Tensor:
    """Bytes as the tower reads them."""
    return patches.float() / 127.5 - 1 if patches.dtype is torch.uint8 else patches
