"""Vision tower on packed patches: fixed resolution, NaFlex and local crops are one path."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from siglip2_kernels import patch_embed, posemb_resample

from .layers import Encoder, Linear, MapHead, init_encoder, init_lecun_normal, init_map_head
from .presets import VisionConfig
from .sequences import Kept, Sequences


class VisionOutput(NamedTuple):
    tokens: Tensor  # (T, D), or (S, D) of `kept`, after the final norm; what a decoder reads
    pooled: Tensor  # (B, D)


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
        patches: Tensor,  # (T, P*P*C) uint8, or float in [-1, 1]
        grid_hw: Tensor,  # (B, 2) int32, on the host: patches down and across each image
        seqs: Sequences,
        dtype: torch.dtype = torch.float32,
        *,
        mask: Tensor | None = None,  # (T,) bool: patches that become `mask_token`
        mask_token: Tensor | None = None,  # (D,)
        kept: Kept | None = None,  # the tokens that are needed; None: all
    ) -> VisionOutput:
        """The pooled embedding of a sequence reads its `kept` tokens alone."""
        posemb = posemb_resample(self.posemb, grid_hw, num_tokens=patches.shape[0], dtype=dtype)
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        masking = {"mask": mask, "mask_token": mask_token}
        x = patch_embed(patches, weight, bias, posemb=posemb, dtype=dtype, **masking)
        tokens = self.encoder(x, seqs, kept)
        return VisionOutput(tokens, self.pool(tokens, seqs if kept is None else kept.plan))

    def init_weights(self) -> None:
        """As big_vision.

        Patch embedding lecun-normal, positions N(0, 1/D), the rest xavier-uniform.
        """
        init_lecun_normal(self.patch_embed)
        nn.init.normal_(self.posemb, std=1 / math.sqrt(self.config.size.width))
        init_encoder(self.encoder)
        init_map_head(self.pool)
