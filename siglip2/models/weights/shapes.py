"""The architecture of a checkpoint, read from its tensors' shapes and what its config adds."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from ...errors import CheckpointError
from ..presets import ARCHITECTURES, TowerSize, VisionConfig


def depth(names: Iterable[str], pattern: str) -> int:
    """Layers named by `pattern`, whose one group is the number; a gap shows as missing keys."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def square_side(tokens: int, what: str) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"need a square grid of {what}; got {tokens}")
    return side


def patch_size_of(features: int) -> int:
    """Patch side of a linear patch embedding over P*P*3 values."""
    side = math.isqrt(features // 3)
    if 3 * side * side != features:
        raise CheckpointError(f"need a patch embedding over P*P*3 values; got {features}")
    return side


def heads_of_released(width: int, num_layers: int, mlp_width: int, *, what: str) -> int:
    """Heads of the preset tower with this shape: files without a config do not say."""
    for size in _preset_sizes():
        if (size.width, size.depth, size.mlp_width) == (width, num_layers, mlp_width):
            return size.num_heads
    raise CheckpointError(
        f"{what} does not say how many attention heads its towers have, and no released tower has"
        f" width {width},"
        f" depth {num_layers} and MLP width {mlp_width}; put its config beside it, or load it into"
        " create_model(name, pretrained=...)"
    )


def as_released(vision: VisionConfig) -> VisionConfig:
    """`vision` with the image size of its preset: a grid does not tell 378 from 384 pixels."""
    for architecture in ARCHITECTURES.values():
        known = architecture.vision
        if known.grid_size == vision.grid_size and known == replace(
            vision, image_size=known.image_size
        ):
            return known
    return vision


def tower(width: int, num_layers: int, mlp_width: int, num_heads: int, *, what: str) -> TowerSize:
    if num_heads < 1 or width % num_heads:
        raise CheckpointError(f"{what}: {num_heads} heads do not divide the width {width}")
    return TowerSize(width=width, depth=num_layers, mlp_width=mlp_width, num_heads=num_heads)


def _preset_sizes() -> Iterable[TowerSize]:
    for architecture in ARCHITECTURES.values():
        yield architecture.vision.size
        yield architecture.text.size
