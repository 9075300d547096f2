"""The LocCa decoder and its loss in plain PyTorch: rivals of ours, under our weights' names."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_layers import (
    Attend,
    Weights,
    at_least_float32,
    attend_padded,
    linear,
    mlp,
    norm,
)

IGNORED = -100


class PaddedTexts(NamedTuple):
    """One text an image of one task, padded to the decoder's length."""

    ids: Tensor  # (B, L) int64
    target: Tensor  # (B, L) int64, `IGNORED` in prefixes and padding
    allowed: Tensor | None  # (B, 1, L, L) bool; None: causal, which hides padding behind a text


class OrderedTexts(NamedTuple):
    """All texts packed, those guessed all at once first: a call of attention has one mask."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    target: Tensor  # (C,) int64 of the tokens that count
    weight: Tensor  # (C,) float32
    counted: Tensor  # (C,) int64
    num_parallel: int  # tokens of the first kind
    own: tuple[Tensor, Tensor]  # cu_seqlens of texts of either kind
    of_images: tuple[Tensor, Tensor]  # cu_seqlens of images' tokens of either kind
    vision: Tensor  # cu_seqlens
    longest: int  # tokens of an image, or more
    longest_vision: int


def decode_padded(
    w: Weights,
    ids: Tensor,  # (B, L)
    allowed: Tensor | None,
    vision: Tensor,  # (B, N, Dv)
    depth: int,
    num_heads: int,
) -> Tensor:  # (B, L, D)
    """One task; keys and values of the vision tokens are made anew."""
    mask = {"is_causal": True} if allowed is None else {"attn_mask": allowed}
    x = F.embedding(ids, w["token_embed"]) + w["posemb"][: ids.shape[1]]
    x = x.to(vision.dtype)  # the tables may be float32
    for i in range(depth):
        at = f"blocks.{i}"
        q, k, v = linear(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv").chunk(3, -1)
        x = x + linear(attend_padded(q, k, v, num_heads, **mask), w, f"{at}.attn.out")
        q = linear(norm(x, w, f"{at}.norm2"), w, f"{at}.cross.q")
        k, v = linear(vision, w, f"{at}.cross.kv").chunk(2, -1)
        x = x + linear(attend_padded(q, k, v, num_heads), w, f"{at}.cross.out")
        x = x + mlp(norm(x, w, f"{at}.norm3"), w, f"{at}.mlp")
    return norm(x, w, "norm")


def padded_loss(w: Weights, hidden: Tensor, target: Tensor) -> Tensor:  # (B, L, D), (B, L) -> ()
    """Mean over texts of the mean over their tokens, of float32 logits."""
    logits = at_least_float32(F.linear(hidden, w["own_head"], w["head_bias"])).flatten(0, 1)
    losses = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="none")
    counts = target != IGNORED
    return (losses.view_as(target).sum(1) / counts.sum(1)).mean()


def decode_packed(
    w: Weights,
    texts: OrderedTexts,
    vision: Tensor,  # (S, Dv)
    depth: int,
    num_heads: int,
    attend: Attend,
) -> Tensor:  # (C, D) of the tokens that count
    """All tasks at once, without padding; keys and values of the vision tokens are made once."""
    P, longest = texts.num_parallel, texts.longest
    x = F.embedding(texts.ids, w["token_embed"]) + F.embedding(texts.positions, w["posemb"])
    x = x.to(vision.dtype)
    for i in range(depth):
        at = f"blocks.{i}"
        qkv = linear(norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv")
        q, k, v = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
        y = [
            attend(q[part], k[part], v[part], cu, cu, longest, longest, causal)
            for part, cu, causal in zip(
                (slice(None, P), slice(P, None)), texts.own, (False, True), strict=True
            )
        ]
        x = x + linear(torch.cat(y).flatten(1), w, f"{at}.attn.out")
        q = linear(norm(x, w, f"{at}.norm2"), w, f"{at}.cross.q").unflatten(1, (num_heads, -1))
        kv = linear(vision, w, f"{at}.cross.kv").unflatten(1, (2, num_heads, -1))
        bounds = (texts.vision, longest, texts.longest_vision, False)
        y = [
            attend(q_part, *kv.unbind(1), cu, *bounds)
            for q_part, cu in zip((q[:P], q[P:]), texts.of_images, strict=True)
        ]
        x = x + linear(torch.cat(y).flatten(1), w, f"{at}.cross.out")
        x = x + mlp(norm(x, w, f"{at}.norm3"), w, f"{at}.mlp")
    return norm(x, w, "norm").index_select(0, texts.counted)


def packed_loss(w: Weights, hidden: Tensor, texts: OrderedTexts) -> Tensor:  # (C, D) -> ()
    logits = at_least_float32(F.linear(hidden, w["own_head"], w["head_bias"]))
    return (F.cross_entropy(logits, texts.target, reduction="none") * texts.weight).sum()
