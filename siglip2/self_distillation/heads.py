"""Head that compares embeddings with prototypes, and its teacher (DINO, arXiv:2104.14294)."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import Linear
from .config import HeadConfig
from .teacher import Pairs, copy_parameters, frozen, parameter_pairs


class HeadOutput(NamedTuple):
    """Logits are z times the unit rows of `prototypes`; nobody makes them."""

    z: Tensor  # (T, D) unit rows
    prototypes: Tensor  # (K, D) of any length, at least float32


class PrototypeHead(nn.Module):
    """MLP with GELU, unit length, and weight-normed prototypes: their lengths count as 1.

    The loss divides by their lengths. It takes them from the output: of a sharded head (FSDP2, as
    a root of its own) they are whole from the forward to the backward.
    """

    def __init__(self, width: int, config: HeadConfig):
        super().__init__()
        widths = [width, *[config.hidden_width] * (config.depth - 1), config.bottleneck]
        self.layers = nn.ModuleList(Linear(*pair) for pair in pairwise(widths))
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))
        self.init_weights()

    def forward(self, x: Tensor) -> HeadOutput:  # (T, width)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        z = self.layers[-1](x)
        unit = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        return HeadOutput(unit.to(z.dtype), self.prototypes)

    def init_weights(self) -> None:
        """As DINO: N(0, 0.02) truncated at +-2, biases 0; prototypes in random directions."""
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.prototypes)


class TaughtHead(nn.Module):
    """A head that learns, and the moving average of it that teaches.

    The teacher is float32, takes no gradient and no optimiser sees it. Call `begin` when training
    begins, and `siglip2.self_distillation.ema_update` of `pairs` after each optimiser step.
    """

    def __init__(self, width: int, config: HeadConfig | None = None):
        super().__init__()
        config = config or HeadConfig()
        self.width, self.config = width, config
        self.student = PrototypeHead(width, config)
        self.teacher = frozen(PrototypeHead(width, config))
        self.begin()

    def begin(self) -> None:
        """The teacher becomes the student."""
        copy_parameters(self.pairs())

    def pairs(self) -> Pairs:
        return parameter_pairs(self.teacher, self.student)

    @torch.no_grad()
    def teach(self, x: Tensor) -> HeadOutput:  # (S, width)
        return self.teacher(x)

    def forward(self, x: Tensor) -> HeadOutput:  # (T, width)
        return self.student(x)
