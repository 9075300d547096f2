"""Random shifts for data sets small enough to be learned by heart.

Not part of the published recipe.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WHITE = 255


def random_shift(
    image: Tensor,  # (B, C, H, W) uint8
    max_share: float,
    rng: np.random.Generator,
) -> Tensor:  # (B, C, H, W) uint8
    """Each image moved by up to `max_share` of its sides; white moves in, as behind a drawing."""
    B, _, H, W = image.shape
    most_y, most_x = round(max_share * H), round(max_share * W)
    padded = F.pad(image, (most_x, most_x, most_y, most_y), value=WHITE)
    first_y = torch.from_numpy(rng.integers(2 * most_y + 1, size=(B, 1, 1)))
    first_x = torch.from_numpy(rng.integers(2 * most_x + 1, size=(B, 1, 1)))
    rows, columns = first_y + torch.arange(H)[:, None], first_x + torch.arange(W)
    which = torch.arange(B)[:, None, None]
    return padded[which, :, rows, columns].permute(0, 3, 1, 2).contiguous()
