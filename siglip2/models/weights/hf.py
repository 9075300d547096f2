"""transformers: `SiglipModel` (fixed size) and `Siglip2Model` (NaFlex); config.json +
model.safetensors.

Key names and configs: transformers/models/siglip and siglip2. The text model always reads the last
position.
"""

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ..layers import LAYER_NORM_EPS
from ..presets import Architecture, TextConfig, TowerSize, VisionConfig
from . import shapes
from .match import require_tensor
from .rules import AFFINE, Rule, State, affine, conv_patch_embed, regroup, rename, reshape

VISION_PREFIX = "vision_model."
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# transformers' defaults, which its config.json files leave out
DEFAULT_HEADS, DEFAULT_DEPTH, DEFAULT_IMAGE_SIZE, DEFAULT_ACT = 12, 12, 224, "gelu_pytorch_tanh"


def recognises(tensors: State) -> bool:
    return any(name.startswith((VISION_PREFIX, "text_model.")) for name in tensors)


def clean(tensors: State) -> State:
    """Old files carry the constant position ids."""
    return {name: x for name, x in tensors.items() if not name.endswith(".position_ids")}


def _encoder_rules(ours: str, theirs: str, depth: int) -> list[Rule]:
    rules: list[Rule] = []
    for i in range(depth):
        a, b = f"{ours}.blocks.{i}", f"{theirs}.layers.{i}"
        rules += affine(f"{a}.norm1", f"{b}.layer_norm1")
        for name in AFFINE:
            split = [f"{b}.self_attn.{part}.{name}" for part in PROJECTIONS]
            rules.append(regroup([f"{a}.attn.qkv.{name}"], split, (3,), (1, 1, 1)))
        rules += affine(f"{a}.attn.out", f"{b}.self_attn.out_proj")
        rules += affine(f"{a}.norm2", f"{b}.layer_norm2")
        rules += affine(f"{a}.mlp.fc1", f"{b}.mlp.fc1")
        rules += affine(f"{a}.mlp.fc2", f"{b}.mlp.fc2")
    return rules


def vision_rules(config: VisionConfig) -> list[Rule]:
    D, G = config.size.width, config.grid_size
    embed = "vision_model.embeddings.patch_embedding"
    if config.is_naflex:
        weight = rename("vision.patch_embed.weight", f"{embed}.weight")
    else:
        weight = conv_patch_embed("vision.patch_embed.weight", f"{embed}.weight", config.patch_size)
    head = "vision_model.head"
    positions = "vision_model.embeddings.position_embedding.weight"
    rules = [
        weight,
        rename("vision.patch_embed.bias", f"{embed}.bias"),
        reshape("vision.posemb", positions, (G, G, D), (G * G, D)),
        *_encoder_rules("vision.encoder", "vision_model.encoder", config.size.depth),
        *affine("vision.encoder.norm", "vision_model.post_layernorm"),
        reshape("vision.pool.probe", f"{head}.probe", (1, D), (1, 1, D)),
    ]
    for name in AFFINE:
        ours = [f"vision.pool.{part}.{name}" for part in ("q", "kv")]
        rules.append(regroup(ours, [f"{head}.attention.in_proj_{name}"], (1, 2), (3,)))
    rules += affine("vision.pool.out", f"{head}.attention.out_proj")
    rules += affine("vision.pool.norm", f"{head}.layernorm")
    rules += affine("vision.pool.mlp.fc1", f"{head}.mlp.fc1")
    return rules + affine("vision.pool.mlp.fc2", f"{head}.mlp.fc2")


def rules(architecture: Architecture) -> list[Rule]:
    text = architecture.text
    if text.pool != "last":
        raise CheckpointError(
            "transformers' text model reads the last position and has no place for text_pool='map';"
            " save with format='big_vision'"
        )
    return [
        *vision_rules(architecture.vision),
        rename("text.token_embed", "text_model.embeddings.token_embedding.weight"),
        rename("text.posemb", "text_model.embeddings.position_embedding.weight"),
        *_encoder_rules("text.encoder", "text_model.encoder", text.size.depth),
        *affine("text.encoder.norm", "text_model.final_layer_norm"),
        *affine("text.head", "text_model.head"),
        reshape("log_scale", "logit_scale", (), (1,)),
        reshape("bias", "logit_bias", (), (1,)),
    ]


def architecture(tensors: State, config: Mapping[str, Any] | None, *, what: str) -> Architecture:
    vision = _vision(tensors, None if config is None else config.get("vision_config", {}), what)
    text = _size(
        tensors, "text_model", None if config is None else config.get("text_config", {}), what
    )
    embeddings = "text_model.embeddings"
    tokens = require_tensor(tensors, f"{embeddings}.token_embedding.weight", what=what)
    positions = require_tensor(tensors, f"{embeddings}.position_embedding.weight", what=what)
    head = require_tensor(tensors, "text_model.head.weight", what=what)
    return Architecture(
        vision=vision,
        text=TextConfig(
            size=text,
            embed_dim=head.shape[0],
            vocab_size=tokens.shape[0],
            length=positions.shape[0],
        ),
    )


def _vision(tensors: State, config: Mapping[str, Any] | None, what: str) -> VisionConfig:
    embeddings = "vision_model.embeddings"
    kernel = require_tensor(tensors, f"{embeddings}.patch_embedding.weight", what=what)
    positions = require_tensor(tensors, f"{embeddings}.position_embedding.weight", what=what)
    is_naflex = kernel.ndim == 2
    patch_size = shapes.patch_size_of(kernel.shape[1]) if is_naflex else kernel.shape[-1]
    side = shapes.square_side(positions.shape[0], "positions") * patch_size
    if config is not None and not is_naflex:
        image_size = config.get("image_size", DEFAULT_IMAGE_SIZE)
        if image_size // patch_size != side // patch_size:
            raise CheckpointError(
                f"{what}: image_size {image_size} of its config has another grid than the"
                f" {positions.shape[0]}"
                f" positions of its weights (patch size {patch_size})"
            )
        side = image_size
    vision = VisionConfig(
        size=_size(tensors, "vision_model", config, what),
        patch_size=patch_size,
        image_size=side,
        is_naflex=is_naflex,
    )
    return vision if config is not None else shapes.as_released(vision)


def _size(tensors: State, tower: str, config: Mapping[str, Any] | None, what: str) -> TowerSize:
    fc1 = require_tensor(tensors, f"{tower}.encoder.layers.0.mlp.fc1.weight", what=what)
    mlp_width, width = fc1.shape
    if config is None:
        num_layers = shapes.depth(tensors, rf"{tower}\.encoder\.layers\.(\d+)\.")
        heads = shapes.heads_of_released(width, num_layers, mlp_width, what=what)
        return shapes.tower(width, num_layers, mlp_width, heads, what=what)
    act, eps = config.get("hidden_act", DEFAULT_ACT), config.get("layer_norm_eps", LAYER_NORM_EPS)
    if act != DEFAULT_ACT or eps != LAYER_NORM_EPS:
        raise CheckpointError(
            f"{what}: need hidden_act {DEFAULT_ACT!r} and layer_norm_eps {LAYER_NORM_EPS};"
            f" its config says {act!r} and {eps}"
        )
    # The config's depth, not the file's: weights that lost their last layers are no shallower
    # model.
    num_layers = config.get("num_hidden_layers", DEFAULT_DEPTH)
    heads = config.get("num_attention_heads", DEFAULT_HEADS)
    return shapes.tower(width, num_layers, mlp_width, heads, what=what)


def model_type(vision: VisionConfig) -> str:
    return "siglip2" if vision.is_naflex else "siglip"
