"""Several batches of images in one pass of a tower."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.inputs import VisionInputs
from ..models.sequences import Kept, kept, ragged
from ..models.vision import VisionOutput, VisionTower
from .masks import Masks


class View(NamedTuple):
    inputs: VisionInputs
    masks: Masks | None = None
    only_hidden: bool = False  # of its tokens; the last block makes no others


def encode(
    tower: VisionTower,
    views: Sequence[View],
    dtype: torch.dtype,
    mask_token: Tensor | None = None,  # (D,) what hidden patches become
) -> list[VisionOutput]:
    """What the tower says of each of `views`, which it sees as one packed batch.

    Tokens of a view with `only_hidden` are those of its `masks.index`; its pooled rows mean
    nothing.
    """
    grids = [view.inputs.grid_hw.tolist() for view in views]
    lengths = [[h * w for h, w in grid] for grid in grids]
    needed = _needed(views, lengths)
    hiding = {"mask": _mask(views), "mask_token": mask_token, "kept": needed}
    if len(views) == 1:
        return [tower(*views[0].inputs, dtype, **hiding)]
    patches = [view.inputs.patches for view in views]
    if len({x.dtype for x in patches}) > 1:
        patches = [_floats(x) for x in patches]
    grid_hw = torch.tensor([size for grid in grids for size in grid], dtype=torch.int32).view(-1, 2)
    seqs = ragged([n for of_view in lengths for n in of_view], patches[0].device)
    out = tower(torch.cat(patches), grid_hw, seqs, dtype, **hiding)
    tokens = [sum(_left(*pair)) for pair in zip(views, lengths, strict=True)]
    parts = out.tokens.split(tokens), out.pooled.split([len(grid) for grid in grids])
    return [VisionOutput(*part) for part in zip(*parts, strict=True)]


def _mask(views: Sequence[View]) -> Tensor | None:  # (T,) bool of all views
    if all(view.masks is None for view in views):
        return None
    return torch.cat(
        [
            torch.zeros(len(inputs.patches), dtype=torch.bool, device=inputs.patches.device)
            if masks is None
            else masks.mask
            for inputs, masks, _ in views
        ]
    )


def _left(view: View, lengths: list[int]) -> Sequence[int]:
    """Tokens of each image that are made in the last block."""
    return view.masks.num_hidden if view.only_hidden else lengths


def _needed(views: Sequence[View], lengths: list[list[int]]) -> Kept | None:
    """What all views need of the last block; None: every token."""
    if not any(view.only_hidden for view in views):
        return None
    rows, left, start = [], [], 0
    for view, of_view in zip(views, lengths, strict=True):
        T, device = sum(of_view), view.inputs.patches.device
        own = view.masks.index if view.only_hidden else torch.arange(T, device=device)
        rows.append(own + start)
        left += _left(view, of_view)
        start += T
    return kept(torch.cat(rows), left, [n for of_view in lengths for n in of_view])


def _floats(patches: Tensor) -> Tensor:
    """Bytes as the tower reads them."""
    return patches.float() / 127.5 - 1 if patches.dtype is torch.uint8 else patches
