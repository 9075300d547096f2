"""open_clip's `CustomTextCLIP` with a timm vision tower; open_clip_config.json +
open_clip_model.safetensors.

A config names its vision tower by timm entry. Sizes timm has no entry for are written too, with the
sizes in a "siglip2" block that open_clip ignores; open_clip itself can load those once timm knows
the entry.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...errors import CheckpointError
from ..layers import LAYER_NORM_EPS
from ..presets import Architecture, TextConfig, VisionConfig
from . import shapes, timm
from .match import require_tensor
from .rules import Rule, State, affine, rename

VISION_PREFIX = "visual."
TRUNK = "visual.trunk."
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
FILES = (WEIGHTS, "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
BLOCK_NAMES = {
    "norm1": "ln_1",
    "attn.out": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def recognises(tensors: State) -> bool:
    return any(name.startswith(TRUNK) for name in tensors)


def vision_rules(config: VisionConfig) -> list[Rule]:
    return timm.vision_rules(config, TRUNK)


def rules(architecture: Architecture) -> list[Rule]:
    text = architecture.text
    if text.pool != "last":
        raise CheckpointError(
            "open_clip's SigLIP 2 text tower reads the last position and has no place for"
            " text_pool='map';"
            " save with format='big_vision'"
        )
    table = [
        *vision_rules(architecture.vision),
        rename("text.token_embed", "text.token_embedding.weight"),
        rename("text.posemb", "text.positional_embedding"),
    ]
    for i in range(text.size.depth):
        ours, theirs = f"text.encoder.blocks.{i}", f"text.transformer.resblocks.{i}"
        for name in ("weight", "bias"):
            table.append(rename(f"{ours}.attn.qkv.{name}", f"{theirs}.attn.in_proj_{name}"))
        for a, b in BLOCK_NAMES.items():
            table += affine(f"{ours}.{a}", f"{theirs}.{b}")
    return [
        *table,
        *affine("text.encoder.norm", "text.ln_final"),
        *affine("text.head", "text.text_projection"),
        rename("log_scale", "logit_scale"),
        rename("bias", "logit_bias"),
    ]


def architecture(tensors: State, config: Mapping[str, Any] | None, *, what: str) -> Architecture:
    model = (config or {}).get("model_cfg", config) or {}
    sizes = (config or {}).get("siglip2", {})
    vision = timm.vision(
        tensors,
        sizes.get("vision", {}).get("size", {}).get("num_heads"),
        what=what,
        prefix=TRUNK,
        num_layers=sizes.get("vision", {}).get("size", {}).get("depth"),
    )
    text = model.get("text_cfg", {})
    tokens = require_tensor(tensors, "text.token_embedding.weight", what=what)
    positions = require_tensor(tensors, "text.positional_embedding", what=what)
    projection = require_tensor(tensors, "text.text_projection.weight", what=what)
    fc = require_tensor(tensors, "text.transformer.resblocks.0.mlp.c_fc.weight", what=what)
    mlp_width, width = fc.shape
    depth = text.get("layers") or shapes.depth(tensors, r"text\.transformer\.resblocks\.(\d+)\.")
    heads = text.get("heads") or shapes.heads_of_released(width, depth, mlp_width, what=what)
    return Architecture(
        vision=vision,
        text=TextConfig(
            size=shapes.tower(width, depth, mlp_width, heads, what=what),
            embed_dim=projection.shape[0],
            vocab_size=tokens.shape[0],
            length=positions.shape[0],
        ),
    )


def vision_entry(config: VisionConfig) -> str:
    """The timm entry open_clip will ask for."""
    if timm.is_released(config):
        return timm.timm_name(config)
    size = config.size
    kind = "naflexvit" if config.is_naflex else "vit"
    side = config.grid_size * config.patch_size
    shape = f"w{size.width}d{size.depth}h{size.num_heads}"
    return f"siglip2_{kind}_{shape}_patch{config.patch_size}_{side}"


def config_files(architecture: Architecture) -> dict[str, dict[str, Any]]:
    vision, text = architecture.vision, architecture.text
    side = vision.grid_size * vision.patch_size
    text_config = {
        "act_kwargs": {"approximate": "tanh"},
        "context_length": text.length,
        "heads": text.size.num_heads,
        "layers": text.size.depth,
        "mlp_ratio": (text.size.mlp_width + 0.5) / text.size.width,  # truncated after the product
        "no_causal_mask": True,
        "norm_kwargs": {"eps": LAYER_NORM_EPS},
        "pool_type": "last",
        "proj_bias": True,
        "tokenizer_kwargs": {"clean": "lower"},
        "vocab_size": text.vocab_size,
        "width": text.size.width,
    }
    content = {
        "model_cfg": {
            "custom_text": True,
            "embed_dim": text.embed_dim,
            "init_logit_bias": -10,
            "text_cfg": text_config,
            "vision_cfg": {
                "image_size": side,
                "timm_model_name": vision_entry(vision),
                "timm_pool": "map",
                "timm_proj": "none",
            },
        },
        "preprocess_cfg": {
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "resize_mode": "squash",
            "std": [0.5, 0.5, 0.5],
        },
        "siglip2": {"text": asdict(text), "vision": asdict(vision)},
    }
    return {CONFIG: content}
