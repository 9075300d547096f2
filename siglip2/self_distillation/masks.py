"""Which patches are hidden: the same number of every image each time, drawn on the device."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_BLOCKS = 12  # rectangles drawn for an image; those that are not needed are not used
_MIN_BLOCK = 4  # patches (DINOv2)
_ASPECT = 0.3  # a block's height over width is log-uniform between this and its inverse (DINOv2)

Grids = Sequence[Sequence[int]]  # patches down and across each image


class Masks(NamedTuple):
    """Hidden patches of packed images. The shapes depend on the grids alone."""

    mask: Tensor  # (T,) bool
    index: Tensor  # (S,) int64 hidden rows; those of an image follow one another
    hidden_share: Tensor  # (T,) float32: 1 / hidden patches of the image
    visible_share: Tensor  # (T,) float32: 1 / other patches of the image
    num_hidden: tuple[int, ...]  # (B,) of each image, on the host

    def hidden_weights(self) -> Tensor:  # (S,)
        """Of hidden patches: those of an image sum to 1."""
        return self.hidden_share[self.index]

    def all_weights(self, visible: float) -> Tensor:  # (T,)
        """Of all patches: hidden ones of an image sum to 1, the others to `visible`."""
        return torch.where(self.mask, self.hidden_share, visible * self.visible_share)


class MaskToken(nn.Module):
    """What hidden patches become. A module, so that FSDP2 can shard it as a root of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.weight, std=0.02)  # not published

    def forward(self) -> Tensor:  # (D,)
        return self.weight.clone()  # hooks of FSDP2 are on what comes out: no parameter


def draw_masks(
    grids: Grids,  # on the host
    share: float,
    *,
    generator: torch.Generator,
    layout: Literal["random", "blocks"] = "random",
) -> Masks:
    """Hide floor(`share` * patches) of every image, on the generator's device.

    Random ones, or rectangles one after another until that number is reached, the last one in
    part (BEiT's blocks with DINOv3's exact number). Patches are sorted by (image, first rectangle
    over them, noise), and the first of each image are hidden: nothing waits for the device.

    Raises ValueError for a share outside [0, 1] or another layout.
    """
    if not 0 <= share <= 1 or layout not in ("random", "blocks"):
        got = f"{share} and {layout!r}"
        raise ValueError(f"need a share from 0 to 1 and layout 'random' or 'blocks'; got {got}")
    device = generator.device
    lengths = np.array([h * w for h, w in grids], dtype=np.int64)
    hidden = np.floor(share * lengths).astype(np.int64)
    image = np.repeat(np.arange(len(lengths)), lengths)
    key = torch.randint(2**31, (len(image),), generator=generator, device=device)
    image_there = _there(image, device)
    if layout == "blocks":
        key += _first_block(grids, image_there, share, generator) << 31
    order = (key + (image_there << 36)).argsort(stable=True)
    index = order[_there(_first_rows(lengths, hidden), device)]
    mask = torch.zeros(len(image), dtype=torch.bool, device=device).index_fill_(0, index, True)
    shares = [(1 / n.clip(1))[image].astype(np.float32) for n in (hidden, lengths - hidden)]
    return Masks(mask, index, *(_there(x, device) for x in shares), tuple(hidden.tolist()))


def _there(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(x).to(device, non_blocking=True)


def _first_rows(lengths: np.ndarray, taken: np.ndarray) -> np.ndarray:  # (sum(taken),)
    """Rows of the first `taken` of each image's `lengths`."""
    skipped = (lengths - taken).cumsum() - (lengths - taken)
    return np.arange(taken.sum()) + np.repeat(skipped, taken)


def _first_block(
    grids: Grids, image: Tensor, share: float, generator: torch.Generator
) -> Tensor:  # (T,) int64 number of the first rectangle over a patch, `_BLOCKS` where none is
    device = generator.device
    grid = torch.tensor(grids, dtype=torch.float32).view(-1, 2).to(device, non_blocking=True)
    draw = partial(torch.rand, len(grid), _BLOCKS, generator=generator, device=device)
    most = (share * grid.prod(1)).clamp(min=_MIN_BLOCK)[:, None]
    area = _MIN_BLOCK + draw() * (most - _MIN_BLOCK)
    aspect = _ASPECT ** (2 * draw() - 1)
    sides = torch.stack([area * aspect, area / aspect], -1).sqrt().round().clamp(min=1)
    sides = torch.minimum(sides, grid[:, None])  # (B, blocks, 2)
    corner = (draw(2) * (grid[:, None] - sides + 1)).floor()
    place = _places(grids).to(device, non_blocking=True)[:, None]  # (T, 1, 2)
    low, high = corner[image], (corner + sides)[image]  # (T, blocks, 2)
    inside = ((place >= low) & (place < high)).all(-1)
    number = torch.arange(_BLOCKS, device=device)
    return torch.where(inside, number, _BLOCKS).amin(1)


def _places(grids: Grids) -> Tensor:  # (T, 2) y, x
    parts = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2) for h, w in grids]
    return torch.cat([torch.empty(0, 2, dtype=torch.int64), *parts])
