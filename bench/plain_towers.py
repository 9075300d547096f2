"""Both towers and the prototype heads in plain PyTorch, under our weights' names.

Padded ones see one kind of images a call; a packed one sees all of them in one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.models.presets import TowerSize

from .plain_layers import Attend, Weights, at_least_float32, attend_padded, cast, linear, mlp, norm

_HEAD_LAYERS = 3  # linear ones before the prototypes, as DINO


class PlainViews(NamedTuple):
    """Images and their views as patches, each kind by itself and all packed one behind another."""

    original: Tensor  # (B, N, P*P*C) float32
    whole: Tensor  # (B, N, P*P*C) global views
    local: Tensor  # (B*V, n, P*P*C)
    mask: Tensor  # (B, N) bool of global views
    hidden: Tensor  # (S,) int64 rows of (B*N, D)
    packed: Tensor  # (T, P*P*C)
    packed_mask: Tensor  # (T,) bool
    cu_seqlens: Tensor  # (B+B+B*V+1,) int32


class Seen(NamedTuple):
    """What the losses need of the student's tower."""

    tokens: Tensor  # (B, N, D) of original images
    pooled: Tensor  # (B, D) of original images
    hidden: Tensor  # (S, D) tokens of global views
    local: Tensor  # (B*V, D) pooled


def positions(table: Tensor, h: int, w: int) -> Tensor:  # (G, G, D) -> (h*w, D)
    if table.shape[:2] == (h, w):
        return table.flatten(0, 1)
    planes = table.permute(2, 0, 1)[None]
    resized = F.interpolate(
        planes, size=(h, w), mode="bilinear", antialias=True, align_corners=False
    )
    return resized[0].flatten(1).T


def _square(table: Tensor, num_patches: int) -> Tensor:  # -> (num_patches, D)
    side = round(num_patches**0.5)
    return positions(table, side, side)


def patch_embedding(w: Weights, patches: Tensor) -> Tensor:
    return linear(patches.to(w["patch_embed.weight"].dtype), w, "patch_embed")


def encode_padded(w: Weights, x: Tensor, size: TowerSize, **mask) -> Tensor:  # (B, N, D)
    """Blocks and the final norm."""
    for i in range(size.depth):
        at = f"encoder.blocks.{i}"
        q, k, v = linear(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv").chunk(3, -1)
        x = x + linear(attend_padded(q, k, v, size.num_heads, **mask), w, f"{at}.attn.out")
        x = x + mlp(norm(x, w, f"{at}.norm2"), w, f"{at}.mlp")
    return norm(x, w, "encoder.norm")


def pool_padded(w: Weights, x: Tensor, size: TowerSize, **mask) -> Tensor:  # (B, N, D) -> (B, D)
    q = linear(w["pool.probe"], w, "pool.q").expand(len(x), 1, -1)
    k, v = linear(x, w, "pool.kv").chunk(2, -1)
    y = linear(attend_padded(q, k, v, size.num_heads, **mask), w, "pool.out")[:, 0]
    return y + mlp(norm(y, w, "pool.norm"), w, "pool.mlp")


def _tokens(
    w: Weights,
    patches: Tensor,  # (B, N, P*P*C)
    size: TowerSize,
    mask: Tensor | None = None,  # (B, N) bool
    mask_token: Tensor | None = None,  # (D,)
) -> Tensor:  # (B, N, D)
    x = patch_embedding(w, patches)
    if mask is not None:
        x = torch.where(mask[..., None], mask_token, x)
    return encode_padded(w, x + _square(w["posemb"], patches.shape[1]).to(x.dtype), size)


def see_apart(
    w: Weights, mask_token: Tensor, views: PlainViews, size: TowerSize, dtype: torch.dtype
) -> Seen:
    """A pass for each kind of images."""
    w = cast(w, dtype)
    tokens = _tokens(w, views.original, size)
    masked = _tokens(w, views.whole, size, views.mask, mask_token.to(dtype))
    local = _tokens(w, views.local, size)
    hidden = masked.flatten(0, 1).index_select(0, views.hidden)
    return Seen(tokens, pool_padded(w, tokens, size), hidden, pool_padded(w, local, size))


def see_packed(
    w: Weights,
    mask_token: Tensor,
    views: PlainViews,
    size: TowerSize,
    dtype: torch.dtype,
    *,
    attend: Attend,
) -> Seen:
    """One pass over all of them, whose attention knows where each begins."""
    w = cast(w, dtype)
    kinds = (views.original, views.whole, views.local)
    places = [_square(w["posemb"], kind.shape[1]).to(dtype).repeat(len(kind), 1) for kind in kinds]
    x = patch_embedding(w, views.packed)
    x = torch.where(views.packed_mask[:, None], mask_token.to(dtype), x) + torch.cat(places)
    bounds = (views.cu_seqlens, views.cu_seqlens, *[views.original.shape[1]] * 2, False)
    for i in range(size.depth):
        at = f"encoder.blocks.{i}"
        qkv = linear(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv")
        q, k, v = qkv.unflatten(1, (3, size.num_heads, -1)).unbind(1)
        x = x + linear(attend(q, k, v, *bounds).flatten(1), w, f"{at}.attn.out")
        x = x + mlp(norm(x, w, f"{at}.norm2"), w, f"{at}.mlp")
    x = norm(x, w, "encoder.norm")
    parts = x.split([kind.shape[0] * kind.shape[1] for kind in kinds])
    tokens, masked, local = (
        part.unflatten(0, kind.shape[:2]) for part, kind in zip(parts, kinds, strict=True)
    )
    hidden = masked.flatten(0, 1).index_select(0, views.hidden)
    return Seen(tokens, pool_padded(w, tokens, size), hidden, pool_padded(w, local, size))


@torch.no_grad()
def teach(
    w: Weights, views: PlainViews, size: TowerSize, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # (B, D) pooled, (S, D) tokens that the student does not see
    w = cast(w, dtype)
    tokens = _tokens(w, views.whole, size)
    return pool_padded(w, tokens, size), tokens.flatten(0, 1).index_select(0, views.hidden)


def read(
    w: Weights,
    text: Tensor,  # (B, L) int64
    size: TowerSize,
    dtype: torch.dtype,
) -> Tensor:  # (B, D)
    """The text tower, which pools its last token."""
    w = cast(w, dtype)
    x = (F.embedding(text, w["token_embed"]) + w["posemb"]).to(dtype)
    return linear(encode_padded(w, x, size)[:, -1], w, "head")


def _head(w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:  # (T, D) -> unit (T, E), unit (K, E)
    w = cast(w, x.dtype)
    for i in range(_HEAD_LAYERS - 1):
        x = F.gelu(linear(x, w, f"layers.{i}"))
    x = linear(x, w, f"layers.{_HEAD_LAYERS - 1}")
    unit = [F.normalize(at_least_float32(rows), dim=-1) for rows in (x, w["prototypes"])]
    return unit[0].to(x.dtype), unit[1].to(x.dtype)


def distil(
    student: Weights,  # of its head
    teacher: Weights,
    centre: Tensor,  # (K,)
    x: Tensor,  # (S*V, D); the V of a teacher's row follow one another
    taught: Tensor,  # (S, D)
    temps: tuple[float, float],  # of student and teacher
) -> tuple[Tensor, Tensor]:  # (), (K,) the loss, the teacher's mean logits
    """As DINOv2 has it: products in x's dtype, the rest in float32 over whole matrices.

    But for the mean, which DINOv2 takes of all logits: it is that of the embeddings.
    """
    with torch.no_grad():
        z, prototypes = _head(teacher, taught)
        mean = at_least_float32(prototypes @ z.mean(0))
        logits = at_least_float32(F.linear(z, prototypes))
        p = F.softmax((logits - centre) / temps[1], dim=-1)
    z, prototypes = _head(student, x)
    logits = at_least_float32(F.linear(z, prototypes))
    log_q = F.log_softmax(logits / temps[0], dim=-1).unflatten(0, (len(p), -1))  # (S, V, K)
    return -torch.sum(p[:, None] * log_q, dim=-1).mean(), mean
