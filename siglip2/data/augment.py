"""Random shifts and canvases for small data sets of square drawings.

Not part of the published recipe.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.data.regions import Region, cropped

WHITE = 255


class Place(NamedTuple):
    """Where a picture lies on its canvas, in shares of the picture's sides."""

    down: float = 0.0
    right: float = 0.0
    height: float = 1.0  # of the canvas
    width: float = 1.0

    def move(self, regions: tuple[Region, ...]) -> tuple[Region, ...]:
        """The picture's regions as the canvas has them, less those no longer half on it."""
        if not regions or self == Place():
            return regions
        canvas = (-self.right, -self.down, self.width - self.right, self.height - self.down)
        kept = (cropped(region, canvas) for region in regions)
        return tuple(region for region in kept if region is not None)


def random_shift(
    image: Tensor,  # (B, C, H, W) uint8
    max_share: float,
    rng: np.random.Generator,
) -> tuple[Tensor, list[Place]]:  # (B, C, H, W) uint8
    """Each image moved by up to `max_share` of its sides; white moves in, as behind a drawing."""
    B, _, H, W = image.shape
    most_y, most_x = round(max_share * H), round(max_share * W)
    padded = F.pad(image, (most_x, most_x, most_y, most_y), value=WHITE)
    first_y = torch.from_numpy(rng.integers(2 * most_y + 1, size=(B, 1, 1)))
    first_x = torch.from_numpy(rng.integers(2 * most_x + 1, size=(B, 1, 1)))
    rows, columns = first_y + torch.arange(H)[:, None], first_x + torch.arange(W)
    which = torch.arange(B)[:, None, None]
    down, right = most_y - first_y.flatten(), most_x - first_x.flatten()
    places = [Place(*at) for at in torch.stack((down / H, right / W), 1).tolist()]
    return padded[which, :, rows, columns].permute(0, 3, 1, 2).contiguous(), places


def on_canvas(
    pixels: Tensor,  # (H, W, 3) uint8
    max_aspect: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Place]:  # (H', W', 3) uint8
    """The picture, unscaled, anywhere on a white canvas that it fills one way.

    Width over height is log-uniform from 1 / `max_aspect` to `max_aspect`.
    """
    H, W, _ = pixels.shape
    aspect = math.exp(rng.uniform(-1, 1) * math.log(max_aspect))
    height, width = max(H, round(W / aspect)), max(W, round(H * aspect))
    canvas = pixels.new_full((height, width, 3), WHITE)
    y, x = rng.integers(height - H + 1), rng.integers(width - W + 1)
    canvas[y : y + H, x : x + W] = pixels
    return canvas, Place(y / H, x / W, height / H, width / W)
