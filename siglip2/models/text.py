"""Text tower: no mask of any kind, padding included; the released models read the last position."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Encoder, Linear, MapHead, init_encoder, init_lecun_normal, init_map_head
from .presets import TextConfig
from .sequences import uniform


class TextTower(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        width = config.size.width
        self.config = config
        self.token_embed = nn.Parameter(torch.empty(config.vocab_size, width))
        self.posemb = nn.Parameter(torch.empty(config.length, width))
        self.encoder = Encoder(config.size)
        self.pool = MapHead(config.size) if config.pool == "map" else None
        self.head = Linear(width, config.embed_dim)

    def forward(
        self,
        text: Tensor,  # (B, L) int64
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # (B, embed_dim)
        B, L = text.shape
        x = F.embedding(text, self.token_embed) + self.posemb
        seqs = uniform(B, L, text.device)
        x = self.encoder(x.to(dtype).flatten(0, 1), seqs)
        pooled = x.unflatten(0, (B, L))[:, -1] if self.pool is None else self.pool(x, seqs)
        return self.head(pooled)

    def init_weights(self) -> None:
        """As big_vision.

        Tokens and positions N(0, 1/D), head lecun-normal, the rest xavier-uniform.
        """
        std = 1 / math.sqrt(self.config.size.width)
        nn.init.normal_(self.token_embed, std=std)
        nn.init.normal_(self.posemb, std=std)
        init_encoder(self.encoder)
        if self.pool is not None:
            init_map_head(self.pool)
        init_lecun_normal(self.head)
