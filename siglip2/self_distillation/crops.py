"""Random resized crops of a batch as two matrix products, wherever its pixels are.

Bilinear with antialias is linear in the pixels and separable: a crop is R X C^T with a matrix for
its rows and one for its columns, whose taps outside the box are 0. Boxes are whole pixels, drawn
as torchvision's RandomResizedCrop draws them, and a crop equals
F.interpolate(image[box], mode="bilinear", antialias=True). Nothing waits for the device.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.inputs import Images, vision_inputs
from ..models.presets import VisionConfig

_TRIES = 10  # boxes drawn for a crop; one that does not fit is drawn again (torchvision)


class Canvas(NamedTuple):
    """Pictures of any size, each in the top left corner of its place."""

    pixels: Tensor  # (B, 3, H, W) float in [0, 1]
    size: Tensor  # (B, 2) float32 height and width of each picture


def canvas(images: Images, config: VisionConfig, device: torch.device) -> Canvas:
    """A batch of any dialect as pixels; packed patches are put back in their places.

    Takes uint8 tensors (B, 3, H, W) as well. Raises ValueError as `vision_inputs`.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"need images (B, 3, H, W); got {tuple(images.shape)}")
        B, _, H, W = images.shape
        pixels = _unit_range(images.to(device, non_blocking=True))
        size = torch.tensor([[H, W]], dtype=torch.float32).to(device, non_blocking=True)
        return Canvas(pixels, size.expand(B, 2))
    inputs = vision_inputs(images, config, device)
    grid, P = np.array(inputs.grid_hw.tolist(), dtype=np.int64).reshape(-1, 2), config.patch_size
    B, (h, w) = len(grid), grid.max(0).tolist()
    # Row of each patch in a (B, h, w) table, from the grids on the host.
    inside = np.arange(h)[:, None] < grid[:, :1, None]
    inside = inside & (np.arange(w) < grid[:, 1:, None])
    rows = torch.from_numpy(np.flatnonzero(inside)).to(device, non_blocking=True)
    table = inputs.patches.new_zeros(B * h * w, inputs.patches.shape[1])
    table = table.index_copy_(0, rows, inputs.patches).view(B, h, w, P, P, 3)
    pixels = table.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, h * P, w * P)
    size = torch.from_numpy((grid * P).astype(np.float32))
    return Canvas(_unit_range(pixels), size.to(device, non_blocking=True))


def _unit_range(pixels: Tensor) -> Tensor:
    if pixels.dtype is torch.uint8:
        return pixels.float() / 255
    return (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) + 1) / 2


class Boxes(NamedTuple):
    """Whole pixels, as floats."""

    corner: Tensor  # (B, V, 2) top, left
    sides: Tensor  # (B, V, 2) height, width


def draw_boxes(
    size: Tensor,  # (B, 2) float32
    num: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> Boxes:
    """`num` boxes an image: the first of ten that fits, else the largest central one."""
    B, low_high = len(size), tuple(map(math.log, aspect))
    draw = partial(torch.rand, B, num, generator=generator, device=size.device)
    target = size.prod(1)[:, None, None] * (area[0] + draw(_TRIES) * (area[1] - area[0]))
    ratio = (low_high[0] + draw(_TRIES) * (low_high[1] - low_high[0])).exp()  # width / height
    tried = torch.stack([target / ratio, target * ratio], -1).sqrt().round()  # (B, V, tries, 2)
    whole = size[:, None, None]  # (B, 1, 1, 2)
    fits = ((tried >= 1) & (tried <= whole)).all(-1)
    first = fits.int().argmax(-1)[..., None, None].expand(B, num, 1, 2)
    found = tried.gather(2, first)[:, :, 0]
    height, width = size.unbind(1)
    largest = torch.stack(
        [
            torch.minimum(height, (width / aspect[0]).round()),
            torch.minimum(width, (height * aspect[1]).round()),
        ],
        -1,
    )[:, None]  # (B, 1, 2)
    has_one = fits.any(-1)[..., None]
    sides = torch.where(has_one, found, largest)
    room = size[:, None] - sides
    corner = torch.where(has_one, (draw(2) * (room + 1)).floor(), (room / 2).floor())
    return Boxes(torch.minimum(corner, room), sides)


def resized_crops(
    canvas: Canvas,
    boxes: Boxes,
    side: int,
    flip: Tensor,  # (B, V) bool: mirrored left to right
) -> Tensor:  # (B * V, 3, side, side); those of an image follow one another
    """Each box, resized to a square."""
    B, C, H, W = canvas.pixels.shape
    V = boxes.sides.shape[1]
    dtype = canvas.pixels.dtype
    down = _weights(boxes.corner[..., 0], boxes.sides[..., 0], side, H, dtype)
    across = _weights(boxes.corner[..., 1], boxes.sides[..., 1], side, W, dtype)
    across = torch.where(flip[..., None, None], across.flip(2), across)
    rows = canvas.pixels.transpose(1, 2).reshape(B, H, C * W)
    rows = (down.flatten(1, 2) @ rows).view(B * V, side * C, W)
    crops = rows @ across.flatten(0, 1).mT
    return crops.view(B * V, side, C, side).transpose(1, 2).contiguous()


def _weights(
    first: Tensor,  # (B, V)
    length: Tensor,  # (B, V)
    out: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:  # (B, V, out, size)
    """Triangle filter of `length` pixels from `first` on, as wide as a pixel of the result."""
    first, length = (x.to(dtype)[..., None, None] for x in (first, length))
    scale = length / out
    source, target = (torch.arange(n, device=first.device, dtype=dtype) + 0.5 for n in (size, out))
    taps = 1 - (source - first - target[:, None] * scale).abs() / scale.clamp(min=1)
    inside = (source > first) & (source < first + length)
    taps = torch.where(inside, taps.clamp(min=0), 0)
    return taps / taps.sum(-1, keepdim=True)
