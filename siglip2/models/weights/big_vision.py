"""big_vision's .npz of a two-tower model: '/'-joined flax names, blocks stacked or one by one,
`params/` or not.

Kernels carry the heads as an axis, so an .npz needs no config. Layout: big_vision models/vit.py,
models/proj/image_text/text_transformer.py; the text tower has a MAP head when text_pool is "map".
"""

from torch import Tensor

from ...errors import CheckpointError
from ..presets import Architecture, Pool, TextConfig, TowerSize, VisionConfig
from . import shapes
from .match import require_tensor
from .rules import AFFINE, NORM, Rule, State, each, regroup, rename, reshape, stack

VISION_PREFIX = "img/"
WEIGHTS = "model.npz"
ATTENTION, MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
PROJECTIONS = ("query", "key", "value")
PARAMS = "params/"


def recognises(tensors: State) -> bool:
    return any(name.removeprefix(PARAMS).startswith(("img/", "txt/")) for name in tensors)


def clean(tensors: State) -> State:
    """Parameters alone, without their prefix: training files also hold the optimiser's state."""
    if not any(name.startswith(PARAMS) for name in tensors):
        return tensors
    return {name.removeprefix(PARAMS): x for name, x in tensors.items() if name.startswith(PARAMS)}


def _transposed(rule: Rule) -> Rule:
    return each(rule, lambda x: x.T, lambda x: x.T)


def _dense(ours: str, theirs: str) -> list[Rule]:
    return [
        _transposed(rename(f"{ours}.weight", f"{theirs}/kernel")),
        rename(f"{ours}.bias", f"{theirs}/bias"),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [rename(f"{ours}.{name}", f"{theirs}/{NORM[name]}") for name in AFFINE]


def _attention(
    ours: str, theirs: str, size: TowerSize, cuts: tuple[str, ...], parts: tuple[int, ...]
) -> list[Rule]:
    D, H = size.width, size.num_heads
    split = lambda name: [f"{theirs}/{part}/{name}" for part in PROJECTIONS]  # noqa: E731
    mine = lambda name: [f"{ours}.{cut}.{name}" for cut in cuts]  # noqa: E731
    weight = regroup(mine("weight"), split("kernel"), parts, (1, 1, 1))
    bias = regroup(mine("bias"), split("bias"), parts, (1, 1, 1))
    out = rename(f"{ours}.out.weight", f"{theirs}/out/kernel")
    return [
        each(weight, lambda x: x.T.reshape(D, H, D // H), lambda x: x.reshape(D, D).T),
        each(bias, lambda x: x.reshape(H, D // H), lambda x: x.reshape(D)),
        each(out, lambda x: x.T.reshape(H, D // H, D), lambda x: x.reshape(D, D).T),
        rename(f"{ours}.out.bias", f"{theirs}/out/bias"),
    ]


def _block(ours: str, theirs: str, size: TowerSize) -> list[Rule]:
    return [
        *_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0"),
        *_attention(f"{ours}.attn", f"{theirs}/{ATTENTION}", size, ("qkv",), (3,)),
        *_norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1"),
        *_dense(f"{ours}.mlp.fc1", f"{theirs}/{MLP}/Dense_0"),
        *_dense(f"{ours}.mlp.fc2", f"{theirs}/{MLP}/Dense_1"),
    ]


def _encoder(ours: str, theirs: str, size: TowerSize, *, stacked: bool) -> list[Rule]:
    def name(i: int) -> str:
        return f"{theirs}/encoderblock" + ("" if stacked else f"_{i}")

    layers = [_block(f"{ours}.blocks.{i}", name(i), size) for i in range(size.depth)]
    if stacked:
        blocks = [stack(same, same[0].theirs) for same in zip(*layers, strict=True)]
    else:
        blocks = [rule for layer in layers for rule in layer]
    return blocks + _norm(f"{ours}.norm", f"{theirs}/encoder_norm")


def _map_head(ours: str, theirs: str, size: TowerSize) -> list[Rule]:
    D = size.width
    return [
        reshape(f"{ours}.probe", f"{theirs}/probe", (1, D), (1, 1, D)),
        *_attention(ours, f"{theirs}/{ATTENTION}", size, ("q", "kv"), (1, 2)),
        *_norm(f"{ours}.norm", f"{theirs}/LayerNorm_0"),
        *_dense(f"{ours}.mlp.fc1", f"{theirs}/{MLP}/Dense_0"),
        *_dense(f"{ours}.mlp.fc2", f"{theirs}/{MLP}/Dense_1"),
    ]


def vision_rules(config: VisionConfig, *, stacked: bool = True) -> list[Rule]:
    D, G, P = config.size.width, config.grid_size, config.patch_size
    weight = _transposed(rename("vision.patch_embed.weight", "img/embedding/kernel"))
    positions = rename("vision.posemb", "img/pos_embedding")
    if not config.is_naflex:
        features = 3 * P * P
        weight = each(weight, lambda x: x.reshape(P, P, 3, D), lambda x: x.reshape(features, D))
        positions = reshape("vision.posemb", "img/pos_embedding", (G, G, D), (1, G * G, D))
    return [
        weight,
        rename("vision.patch_embed.bias", "img/embedding/bias"),
        positions,
        *_encoder("vision.encoder", "img/Transformer", config.size, stacked=stacked),
        *_map_head("vision.pool", "img/MAPHead_0", config.size),
    ]


def rules(architecture: Architecture, *, stacked: bool = True) -> list[Rule]:
    text = architecture.text
    D, L = text.size.width, text.length
    pool = _map_head("text.pool", "txt/MAPHead_0", text.size) if text.pool == "map" else []
    return [
        *vision_rules(architecture.vision, stacked=stacked),
        rename("text.token_embed", "txt/Embed_0/embedding"),
        reshape("text.posemb", "txt/pos_embedding", (L, D), (1, L, D)),
        *_encoder("text.encoder", "txt/Encoder_0", text.size, stacked=stacked),
        *pool,
        *_dense("text.head", "txt/head"),
        reshape("log_scale", "t", (), (1,)),
        reshape("bias", "b", (), (1,)),
    ]


def is_stacked(tensors: State) -> bool:
    return any("/encoderblock/" in name for name in tensors)


def vision(tensors: State, *, what: str) -> VisionConfig:
    kernel = require_tensor(tensors, "img/embedding/kernel", what=what)
    positions = require_tensor(tensors, "img/pos_embedding", what=what)
    is_naflex = kernel.ndim == 2
    patch_size = shapes.patch_size_of(kernel.shape[0]) if is_naflex else kernel.shape[0]
    tokens = positions.numel() // positions.shape[-1]
    found = VisionConfig(
        size=_size(tensors, "img/Transformer", what),
        patch_size=patch_size,
        image_size=shapes.square_side(tokens, "positions") * patch_size,
        is_naflex=is_naflex,
    )
    return shapes.as_released(found)


def architecture(tensors: State, config: None = None, *, what: str) -> Architecture:
    tokens = require_tensor(tensors, "txt/Embed_0/embedding", what=what)
    positions = require_tensor(tensors, "txt/pos_embedding", what=what)
    head = require_tensor(tensors, "txt/head/kernel", what=what)
    pool: Pool = "map" if any(name.startswith("txt/MAPHead_0/") for name in tensors) else "last"
    return Architecture(
        vision=vision(tensors, what=what),
        text=TextConfig(
            size=_size(tensors, "txt/Encoder_0", what),
            embed_dim=head.shape[-1],
            vocab_size=tokens.shape[0],
            length=positions.shape[-2],
            pool=pool,
        ),
    )


def _size(tensors: State, encoder: str, what: str) -> TowerSize:
    block = f"{encoder}/encoderblock" + ("" if is_stacked(tensors) else "_0")
    query = require_tensor(tensors, f"{block}/{ATTENTION}/query/kernel", what=what)
    fc1: Tensor = require_tensor(tensors, f"{block}/{MLP}/Dense_0/kernel", what=what)
    if query.ndim < 3:
        raise CheckpointError(
            f"{what}: need query kernels (..., D, H, E); got {tuple(query.shape)}"
        )
    if is_stacked(tensors):
        num_layers = fc1.shape[0]
    else:
        num_layers = shapes.depth(tensors, rf"{encoder}/encoderblock_(\d+)/")
    return shapes.tower(fc1.shape[-2], num_layers, fc1.shape[-1], query.shape[-2], what=what)
