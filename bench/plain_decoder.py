"""The LocCa decoder and its loss in plain PyTorch: rivals of ours, under our weights' names."""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
Weights = Mapping[str, Tensor]  # all in the dtype of activations
# q (T, H, E), k and v (S, H, E), cu_seqlens of both, the longest of both, causal -> (T, H, E)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool], Tensor]


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


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-6)


def _mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    return _linear(F.gelu(_linear(x, w, f"{name}.fc1"), approximate="tanh"), w, f"{name}.fc2")


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, **mask) -> Tensor:
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, **mask).transpose(1, 2).flatten(2)


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
    for i in range(depth):
        at = f"blocks.{i}"
        q, k, v = _linear(_norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv").chunk(3, -1)
        x = x + _linear(_attend(q, k, v, num_heads, **mask), w, f"{at}.attn.out")
        q = _linear(_norm(x, w, f"{at}.norm2"), w, f"{at}.cross.q")
        k, v = _linear(vision, w, f"{at}.cross.kv").chunk(2, -1)
        x = x + _linear(_attend(q, k, v, num_heads), w, f"{at}.cross.out")
        x = x + _mlp(_norm(x, w, f"{at}.norm3"), w, f"{at}.mlp")
    return _norm(x, w, "norm")


def padded_loss(w: Weights, hidden: Tensor, target: Tensor) -> Tensor:  # (B, L, D), (B, L) -> ()
    """Mean over texts of the mean over their tokens, of float32 logits."""
    logits = F.linear(hidden, w["own_head"], w["head_bias"]).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
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
    for i in range(depth):
        at = f"blocks.{i}"
        qkv = _linear(_norm(x, w, f"{at}.norm1"), w, f"{at}.attn.qkv")
        q, k, v = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
        y = [
            attend(q[part], k[part], v[part], cu, cu, longest, longest, causal)
            for part, cu, causal in zip(
                (slice(None, P), slice(P, None)), texts.own, (False, True), strict=True
            )
        ]
        x = x + _linear(torch.cat(y).flatten(1), w, f"{at}.attn.out")
        q = _linear(_norm(x, w, f"{at}.norm2"), w, f"{at}.cross.q").unflatten(1, (num_heads, -1))
        kv = _linear(vision, w, f"{at}.cross.kv").unflatten(1, (2, num_heads, -1))
        bounds = (texts.vision, longest, texts.longest_vision, False)
        y = [
            attend(q_part, *kv.unbind(1), cu, *bounds)
            for q_part, cu in zip((q[:P], q[P:]), texts.of_images, strict=True)
        ]
        x = x + _linear(torch.cat(y).flatten(1), w, f"{at}.cross.out")
        x = x + _mlp(_norm(x, w, f"{at}.norm3"), w, f"{at}.mlp")
    return _norm(x, w, "norm").index_select(0, texts.counted)


def packed_loss(w: Weights, hidden: Tensor, texts: OrderedTexts) -> Tensor:  # (C, D) -> ()
    logits = F.linear(hidden, w["own_head"], w["head_bias"]).float()
    return (F.cross_entropy(logits, texts.target, reduction="none") * texts.weight).sum()


def torch_varlen() -> Attend:
    """FlashAttention 2 as torch carries it; "causal" had a name of its own before 2.12."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise NotImplementedError("this torch has no torch.nn.attention.varlen") from None
    has_flag = "is_causal" in inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if has_flag else {"window_size": (-1, 0)}

    def attend(q, k, v, cu_q, cu_k, longest_q, longest_k, is_causal):
        options = causal if is_causal else {}
        return varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **options)

    return attend
