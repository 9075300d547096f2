"""timm vision towers: `vit_*_siglip_*` (fixed size) and `naflexvit_*_siglip` (NaFlex); config.json
+ model.safetensors.

timm's base, large and so400m ViT entries compute GELU with erf; the weights were trained with its
tanh form, so the config written here asks for that (`model_args`).
"""

from collections.abc import Mapping
from typing import Any

from ..presets import ARCHITECTURES, VisionConfig
from . import shapes
from .match import require_tensor
from .rules import Rule, State, affine, conv_patch_embed, rename, reshape

VISION_PREFIX = ""
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "pytorch_model.bin")
SIZE_NAMES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}  # by width


def recognises(tensors: State) -> bool:
    return "patch_embed.proj.weight" in tensors or "embeds.proj.weight" in tensors


def vision_rules(config: VisionConfig, prefix: str = "") -> list[Rule]:
    D, G = config.size.width, config.grid_size
    embed = f"{prefix}embeds" if config.is_naflex else f"{prefix}patch_embed"
    if config.is_naflex:
        rules = [
            rename("vision.patch_embed.weight", f"{embed}.proj.weight"),
            reshape("vision.posemb", f"{embed}.pos_embed", (G, G, D), (1, G, G, D)),
        ]
    else:
        weight = f"{embed}.proj.weight"
        rules = [
            conv_patch_embed("vision.patch_embed.weight", weight, config.patch_size),
            reshape("vision.posemb", f"{prefix}pos_embed", (G, G, D), (1, G * G, D)),
        ]
    rules.append(rename("vision.patch_embed.bias", f"{embed}.proj.bias"))
    for i in range(config.size.depth):
        ours, theirs = f"vision.encoder.blocks.{i}", f"{prefix}blocks.{i}"
        for name in ("norm1", "attn.qkv", "norm2", "mlp.fc1", "mlp.fc2"):
            rules += affine(f"{ours}.{name}", f"{theirs}.{name}")
        rules += affine(f"{ours}.attn.out", f"{theirs}.attn.proj")
    rules += affine("vision.encoder.norm", f"{prefix}norm")
    pool = f"{prefix}attn_pool"
    rules.append(reshape("vision.pool.probe", f"{pool}.latent", (1, D), (1, 1, D)))
    for name in ("q", "kv", "norm", "mlp.fc1", "mlp.fc2"):
        rules += affine(f"vision.pool.{name}", f"{pool}.{name}")
    return rules + affine("vision.pool.out", f"{pool}.proj")


def vision(
    tensors: State,
    num_heads: int | None,
    *,
    what: str,
    prefix: str = "",
    num_layers: int | None = None,
) -> VisionConfig:
    """The tower in `tensors`; a shape with no released tower needs `num_heads`."""
    is_naflex = f"{prefix}embeds.proj.weight" in tensors
    embed = f"{prefix}embeds" if is_naflex else f"{prefix}patch_embed"
    positions = f"{embed}.pos_embed" if is_naflex else f"{prefix}pos_embed"
    kernel = require_tensor(tensors, f"{embed}.proj.weight", what=what)
    table = require_tensor(tensors, positions, what=what)
    mlp_width, width = require_tensor(tensors, f"{prefix}blocks.0.mlp.fc1.weight", what=what).shape
    pattern = rf"{prefix}blocks\.(\d+)\.".replace("visual.trunk.", r"visual\.trunk\.")
    num_layers = num_layers or shapes.depth(tensors, pattern)
    if num_heads is None:
        num_heads = shapes.heads_of_released(width, num_layers, mlp_width, what=what)
    patch_size = shapes.patch_size_of(kernel.shape[1]) if is_naflex else kernel.shape[-1]
    side = shapes.square_side(table.numel() // width, "positions") * patch_size
    return shapes.as_released(
        VisionConfig(
            size=shapes.tower(width, num_layers, mlp_width, num_heads, what=what),
            patch_size=patch_size,
            image_size=side,
            is_naflex=is_naflex,
        )
    )


def released_with(tensors: State) -> str | None:
    """The released model that has this vision tower."""
    try:
        found = vision(tensors, None, what="")
    except ValueError:
        return None
    names = (name for name, known in ARCHITECTURES.items() if known.vision == found)
    return next(names, None)


def timm_name(config: VisionConfig) -> str:
    """timm's entry for a released tower; for any other, one to be built with `model_args`."""
    size = SIZE_NAMES.get(config.size.width, "base")
    if config.is_naflex:
        return f"naflexvit_{size if size == 'so400m' else 'base'}_patch16_siglip"
    side = config.grid_size * config.patch_size  # timm says 378 where the checkpoint says 384
    if is_released(config):
        return f"vit_{size}_patch{config.patch_size}_siglip_{side}"
    return "vit_base_patch16_siglip_256"


def is_released(config: VisionConfig) -> bool:
    return config.size.width in SIZE_NAMES and any(
        config == known.vision for known in ARCHITECTURES.values()
    )


def model_args(config: VisionConfig) -> dict[str, Any]:
    """What turns timm's entry into exactly this tower."""
    size = config.size
    args = {
        "act_layer": "gelu_tanh",
        "depth": size.depth,
        "embed_dim": size.width,
        # timm truncates embed_dim * mlp_ratio: half a unit up survives the rounding of the ratio
        "mlp_ratio": (size.mlp_width + 0.5) / size.width,
        "num_heads": size.num_heads,
        "patch_size": config.patch_size,
    }
    side = config.grid_size * config.patch_size
    grid = {"pos_embed_grid_size": [config.grid_size] * 2}
    return args | (grid if config.is_naflex else {"img_size": side})


def num_heads_in(config: Mapping[str, Any] | None) -> int | None:
    return None if config is None else config.get("model_args", {}).get("num_heads")


def config_files(config: VisionConfig) -> dict[str, dict[str, Any]]:
    side = config.grid_size * config.patch_size
    content = {
        "architecture": timm_name(config),
        "num_classes": 0,
        "num_features": config.size.width,
        "global_pool": "map",
        "model_args": model_args(config),
        "pretrained_cfg": {
            "crop_mode": "squash",
            "crop_pct": 1.0,
            "custom_load": False,
            "fixed_input_size": not config.is_naflex,
            "input_size": [3, side, side],
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "embeds.proj" if config.is_naflex else "patch_embed.proj",
            "classifier": "head",
        },
    }
    return {"config.json": content}
