"""Layers in plain PyTorch under our weights' names, of which rivals are made."""

import inspect
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
# q (T, H, E), k and v (S, H, E), cu_seqlens of both, the longest of both, causal -> (T, H, E)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool], Tensor]

# Read as they are: rows of a table are rounded after the look-up, prototypes after their norms.
_TABLES = ("token_embed", "posemb", "prototypes")


def cast(w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x if name.endswith(_TABLES) else x.to(dtype) for name, x in w.items()}


def part(w: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights of one module, under its own names."""
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-6)


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    return linear(F.gelu(linear(x, w, f"{name}.fc1"), approximate="tanh"), w, f"{name}.fc2")


def attend_padded(q: Tensor, k: Tensor, v: Tensor, num_heads: int, **mask) -> Tensor:
    """(B, N, D) each; `mask` as of `F.scaled_dot_product_attention`."""
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, **mask).transpose(1, 2).flatten(2)


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
