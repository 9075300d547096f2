"""Vision tower on packed patches: fixed resolution, NaFlex and local crops are one path."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Encoder, Linear, MapHead, init_encoder, init_lecun_normal, init_map_head
from .presets import VisionConfig
from .sequences import Sequences


class VisionOutput(NamedTuple):
    tokens: Tensor  # (T, D) after the final norm; what a captioning decoder reads
    pooled: Tensor  # (B, D)


def resample_posemb(
    table: Tensor,  # (G, G, D)
    grids: Sequence[tuple[int, int]],  # (h, w) of each image
) -> Tensor:  # (T, D)
    """The position table resampled to each grid (NaFlex).

    Antialiased bilinear, half-pixel centres.
    """
    resampled = {}
    for h, w in set(grids):
        if (h, w) == table.shape[:2]:
            resampled[h, w] = table.flatten(0, 1)
        elif h * w == 0:
            resampled[h, w] = table.new_empty(0, table.shape[-1])
        else:
            resampled[h, w] = _resample(table, h, w)
    if len(resampled) == 1:
        (single,) = resampled.values()
        return single.repeat(len(grids), 1)
    return (
        torch.cat([resampled[grid] for grid in grids])
        if grids
        else table.new_empty(0, table.shape[-1])
    )


def _resample(table: Tensor, h: int, w: int) -> Tensor:  # (G, G, D) -> (h * w, D)
    planes = table.permute(2, 0, 1)[None]  # (1, D, G, G)
    if w == 1 and h > 1:
        # torch's CPU antialias is wrong for a width of 1; a height of 1 is right.
        return _resample(table.transpose(0, 1), 1, h)
    planes = F.interpolate(planes, (h, w), mode="bilinear", align_corners=False, antialias=True)
    return planes[0].flatten(1).T


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width, grid = config.size.width, config.grid_size
        self.config = config
        self.patch_embed = Linear(3 * config.patch_size**2, width)
        self.posemb = nn.Parameter(torch.empty(grid, grid, width))
        self.encoder = Encoder(config.size)
        self.pool = MapHead(config.size)

    def forward(
        self,
        patches: Tensor,  # (T, P*P*C) float in [-1, 1]
        grids: Sequence[tuple[int, int]],  # (h, w) of each image
        seqs: Sequences,
    ) -> VisionOutput:
        x = self.patch_embed(patches)
        x = x + resample_posemb(self.posemb, grids).to(x.dtype)
        tokens = self.encoder(x, seqs)
        return VisionOutput(tokens, self.pool(tokens, seqs))

    def init_weights(self) -> None:
        """As big_vision.

        Patch embedding lecun-normal, positions N(0, 1/D), the rest xavier-uniform.
        """
        init_lecun_normal(self.patch_embed)
        nn.init.normal_(self.posemb, std=1 / math.sqrt(self.config.size.width))
        init_encoder(self.encoder)
        init_map_head(self.pool)
