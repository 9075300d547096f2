"""Building blocks of the towers.

Precision is explicit: weights stay float32, each layer casts to its input's dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip2_kernels import (
    VarlenPlan,
    bias_gelu,
    map_pool,
    varlen_attention,
    varlen_qkv_attention,
)

from .presets import TowerSize
from .sequences import Kept, Sequences

LAYER_NORM_EPS = 1e-6  # flax's default; the released weights need it


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def reset_parameters(self) -> None:
        """Left to the tower's `init_weights`, which knows each layer's role."""


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, *, bias: bool = True):
        super().__init__(width, eps=LAYER_NORM_EPS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int, *, bias: bool = True):
        super().__init__()
        self.fc1 = Linear(width, mlp_width, bias=bias)
        self.fc2 = Linear(mlp_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.fc1) is not Linear or self.fc1.bias is None:  # or somebody's adapter around it
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        h = F.linear(x, self.fc1.weight.to(x.dtype))
        return self.fc2(bias_gelu(h, self.fc1.bias))


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, seqs: Sequences, kept: Kept | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))  # (T, 3, H, E)
        if kept is None:
            y = varlen_qkv_attention(qkv, seqs.cu_seqlens, seqs.max_seqlen, plan=seqs.plan)
        else:
            y = _attend_kept(*qkv.unbind(1), kept)
        return self.out(y.flatten(1))


def _attend_kept(q: Tensor, k: Tensor, v: Tensor, kept: Kept) -> Tensor:  # (T, H, E) -> (S, H, E)
    plan = kept.plan
    return varlen_attention(
        q.index_select(0, kept.index),
        k,
        v,
        plan.cu_seqlens,
        plan.max_seqlen,
        cu_seqlens_k=plan.cu_seqlens_k,
        max_seqlen_k=plan.max_seqlen_k,
        plan=plan,
    )


class Block(nn.Module):
    def __init__(self, size: TowerSize):
        super().__init__()
        self.norm1 = LayerNorm(size.width)
        self.attn = Attention(size.width, size.num_heads)
        self.norm2 = LayerNorm(size.width)
        self.mlp = Mlp(size.width, size.mlp_width)

    def forward(self, x: Tensor, seqs: Sequences, kept: Kept | None = None) -> Tensor:
        y = self.attn(self.norm1(x), seqs, kept)
        x = y + (x if kept is None else x.index_select(0, kept.index))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Pre-norm blocks and the final norm, on packed tokens (T, D); of `kept` alone (S, D)."""

    def __init__(self, size: TowerSize):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = LayerNorm(size.width)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, seqs: Sequences, kept: Kept | None = None) -> Tensor:
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            args = (x, seqs, kept if number == last else None)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        return self.norm(x)


class MapHead(nn.Module):
    """Multi-head attention pooling: one learned probe reads every sequence, then a residual MLP."""

    def __init__(self, size: TowerSize):
        super().__init__()
        self.num_heads = size.num_heads
        self.probe = nn.Parameter(torch.empty(1, size.width))
        self.q = Linear(size.width, size.width)
        self.kv = Linear(size.width, 2 * size.width)
        self.out = Linear(size.width, size.width)
        self.norm = LayerNorm(size.width)
        self.mlp = Mlp(size.width, size.mlp_width)

    def forward(self, x: Tensor, seqs: Sequences | VarlenPlan) -> Tensor:  # (T, D) -> (B, D)
        projections = (self.q.weight, self.q.bias, self.kv.weight, self.kv.bias)
        bounds = (seqs.cu_seqlens, seqs.max_seqlen)
        y = map_pool(x, *bounds, self.probe, *projections, num_heads=self.num_heads)
        y = self.out(y)
        return y + self.mlp(self.norm(y))


def init_linear(layer: Linear, *, bias_std: float = 0.0, num_stacked: int = 1) -> None:
    """Xavier-uniform for each of the `num_stacked` square matrices that share one weight."""
    for part in layer.weight.chunk(num_stacked, dim=0):
        nn.init.xavier_uniform_(part)
    if layer.bias is None:
        return
    nn.init.normal_(layer.bias, std=bias_std) if bias_std else nn.init.zeros_(layer.bias)


def init_lecun_normal(layer: Linear) -> None:
    """flax's default for Dense and Conv.

    Normal of variance 1/fan_in, truncated at two deviations.
    """
    # 0.8796 is the deviation of a unit normal truncated at +-2.
    std = 1 / (math.sqrt(layer.in_features) * 0.87962566103423978)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)


def init_mlp(mlp: Mlp) -> None:
    init_linear(mlp.fc1, bias_std=1e-6)
    init_linear(mlp.fc2, bias_std=1e-6)


def init_encoder(encoder: Encoder) -> None:
    for block in encoder.blocks:
        init_linear(block.attn.qkv, num_stacked=3)
        init_linear(block.attn.out)
        init_mlp(block.mlp)


def init_map_head(head: MapHead) -> None:
    bound = math.sqrt(6 / (1 + head.probe.shape[-1]))  # xavier-uniform of a (1, 1, D) array
    nn.init.uniform_(head.probe, -bound, bound)
    init_linear(head.q)
    init_linear(head.kv, num_stacked=2)
    init_linear(head.out)
    init_mlp(head.mlp)
