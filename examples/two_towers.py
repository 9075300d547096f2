"""A small model and endless synthetic pairs: stand-ins for your own model and data."""

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

IMAGE_DIM, TEXT_DIM, LATENT_DIM = 48, 32, 16


def tower(in_dim: int, width: int, depth: int) -> nn.Sequential:
    layers = [nn.Linear(in_dim, width)]
    for _ in range(depth):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


class TwoTowers(nn.Module):
    """Two perceptrons with the sigmoid loss's learned scalars, at SigLIP's starting values."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.image = tower(IMAGE_DIM, width, depth)
        self.text = tower(TEXT_DIM, width, depth)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))


def pairs(batch: int, device: torch.device, *, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (batch, IMAGE_DIM), (batch, TEXT_DIM): two noisy views of one hidden vector."""
    world = torch.Generator().manual_seed(0)
    views = [torch.randn(LATENT_DIM, n, generator=world) for n in (IMAGE_DIM, TEXT_DIM)]
    draws = torch.Generator().manual_seed(1 + seed)
    while True:
        hidden = torch.randn(batch, LATENT_DIM, generator=draws)
        seen = [hidden @ view for view in views]
        noisy = [x + 0.1 * torch.randn(x.shape, generator=draws) for x in seen]
        yield tuple(x.to(device) for x in noisy)


def arguments(description: str) -> argparse.Namespace:
    """Sizes for seconds on a CPU; on a GPU try --batch 32768 --width 768 --depth 12."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, default=64, help="pairs a device and step")
    parser.add_argument("--width", type=int, default=64, help="of the embeddings and all layers")
    parser.add_argument("--depth", type=int, default=2, help="layers a tower")
    parser.add_argument("--steps", type=int, default=40)
    return parser.parse_args()
