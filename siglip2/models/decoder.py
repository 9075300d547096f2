"""Captioning decoder (LocCa, arXiv:2403.19596; SigLIP 2, section 2.2) on packed tokens.

Pre-norm blocks: self-attention inside each text, cross-attention to all vision tokens of its image,
MLP. What the papers leave open follows CapPa's public code (big_vision, models/proj/cappa).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from siglip2_kernels import VarlenPlan, varlen_attention, varlen_qkv_attention

from .layers import LayerNorm, Linear, Mlp, init_linear
from .presets import Architecture, TowerSize
from .sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    size: TowerSize
    vision_width: int  # of the tokens it reads
    vocab_size: int = 256_000
    length: int = 64  # positions; not published for SigLIP 2, LocCa has 64
    tied_head: bool = False  # not published; CapPa's head is its own
    biases: bool = False  # of the blocks; not published, CapPa has none
    head_bias: bool = True  # as CapPa
    max_coordinate: int = 500  # boxes are whole numbers up to this; LocCa: "up to 500"


def decoder_config(architecture: Architecture, **changes) -> DecoderConfig:
    """The published shape: the text tower's, with half the layers (27 give 13, not published)."""
    text = architecture.text
    size = TowerSize(
        width=text.size.width,
        depth=text.size.depth // 2,
        mlp_width=text.size.mlp_width,
        num_heads=text.size.num_heads,
    )
    shape = {"size": size, "vision_width": architecture.vision.size.width}
    return DecoderConfig(**{**shape, "vocab_size": text.vocab_size, **changes})


class Texts(NamedTuple):
    """Packed texts; those of one image follow one another, images are in order.

    All texts of an image read its vision tokens as one sequence of queries: no mask divides them
    there, so keys and values are made once.
    """

    ids: Tensor  # (T,) int64 input; `Decoder.mask_id` where a token is to be guessed
    positions: Tensor  # (T,) int64 within each text
    seqs: Sequences  # bounds of texts
    lookahead: Tensor  # (N,) int32: 0 for causal texts, at least their length for the others
    images: VarlenPlan  # queries: the tokens of an image's texts; keys: its vision tokens


class SelfAttention(nn.Module):
    def __init__(self, size: TowerSize, *, bias: bool):
        super().__init__()
        self.num_heads = size.num_heads
        self.qkv = Linear(size.width, 3 * size.width, bias=bias)
        self.out = Linear(size.width, size.width, bias=bias)

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))  # (T, 3, H, E)
        bounds = (texts.seqs.cu_seqlens, texts.seqs.max_seqlen)
        options = {"causal": True, "lookahead": texts.lookahead, "plan": texts.seqs.plan}
        return self.out(varlen_qkv_attention(qkv, *bounds, **options).flatten(1))

    def step(
        self,
        x: Tensor,  # (N, D) the newest token of each text
        cache: Tensor,  # (2, N, H, L, E), written at `place`
        place: int,
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (N, H, E)
        cache[0, :, :, place], cache[1, :, :, place] = k, v
        k, v = cache[:, :, :, : place + 1]
        return self.out(F.scaled_dot_product_attention(q[:, :, None], k, v).flatten(1))


class CrossAttention(nn.Module):
    def __init__(self, size: TowerSize, vision_width: int, *, bias: bool):
        super().__init__()
        self.num_heads = size.num_heads
        self.q = Linear(size.width, size.width, bias=bias)
        self.kv = Linear(vision_width, 2 * size.width, bias=bias)
        self.out = Linear(size.width, size.width, bias=bias)

    def keys_and_values(self, vision: Tensor) -> Tensor:  # (S, Dv) -> (S, 2, H, E)
        return self.kv(vision).unflatten(1, (2, self.num_heads, -1))

    def forward(self, x: Tensor, kv: Tensor, images: VarlenPlan) -> Tensor:
        q = self.q(x).unflatten(1, (self.num_heads, -1))  # (T, H, E)
        y = varlen_attention(
            q,
            *kv.unbind(1),
            images.cu_seqlens,
            images.max_seqlen,
            cu_seqlens_k=images.cu_seqlens_k,
            max_seqlen_k=images.max_seqlen_k,
            plan=images,
        )
        return self.out(y.flatten(1))


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        size, bias = config.size, config.biases
        self.norm1 = LayerNorm(size.width, bias=bias)
        self.attn = SelfAttention(size, bias=bias)
        self.norm2 = LayerNorm(size.width, bias=bias)
        self.cross = CrossAttention(size, config.vision_width, bias=bias)
        self.norm3 = LayerNorm(size.width, bias=bias)
        self.mlp = Mlp(size.width, size.mlp_width, bias=bias)

    def forward(self, x: Tensor, vision: Tensor, texts: Texts) -> Tensor:
        x = x + self.attn(self.norm1(x), texts)
        kv = self.cross.keys_and_values(vision)
        x = x + self.cross(self.norm2(x), kv, texts.images)
        return x + self.mlp(self.norm3(x))

    def step(self, x: Tensor, kv: Tensor, images: VarlenPlan, cache: Tensor, place: int) -> Tensor:
        """One token of each text, with what `keys_and_values` gave for its image."""
        x = x + self.attn.step(self.norm1(x), cache, place)
        x = x + self.cross(self.norm2(x), kv, images)
        return x + self.mlp(self.norm3(x))


class Decoder(nn.Module):
    """Hidden states of text tokens; `head` and `head_bias` turn them into logits.

    Weights are float32; activations have the vision tokens' dtype.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width = config.size.width
        self.config = config
        self.grad_checkpointing = False  # blocks are computed again in the backward
        self.token_embed = nn.Parameter(torch.empty(config.vocab_size + 1, width))
        self.posemb = nn.Parameter(torch.empty(config.length, width))
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.size.depth))
        self.norm = LayerNorm(width)
        shape = (config.vocab_size, width)
        self.own_head = None if config.tied_head else nn.Parameter(torch.empty(shape))
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None

    @property
    def mask_id(self) -> int:
        return self.config.vocab_size

    @property
    def head(self) -> Tensor:  # (V, D)
        return self.token_embed[: self.mask_id] if self.own_head is None else self.own_head

    def embed(self, ids: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:  # (T, D)
        x = F.embedding(ids, self.token_embed) + F.embedding(positions, self.posemb)
        return x.to(dtype)

    def forward(
        self,
        texts: Texts,
        vision: Tensor,  # (S, Dv) packed, as `texts.images` says
    ) -> Tensor:  # (T, D)
        x = self.embed(texts.ids, texts.positions, vision.dtype)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, vision, texts, use_reentrant=False)
            else:
                x = block(x, vision, texts)
        return self.norm(x)

    def init_weights(self) -> None:
        """As CapPa.

        Tokens N(0, 1) (N(0, 1/D) when they are the head as well), positions N(0, 1/D), own head and
        biases 0: the first loss is log V. Projections xavier-uniform.
        """
        deviation = 1 / math.sqrt(self.config.size.width)
        nn.init.normal_(self.token_embed, std=deviation if self.own_head is None else 1.0)
        nn.init.normal_(self.posemb, std=deviation)
        for block in self.blocks:
            init_linear(block.attn.qkv, num_stacked=3)
            init_linear(block.cross.kv, num_stacked=2)
            for layer in (block.attn.out, block.cross.q, block.cross.out):
                init_linear(layer)
            for layer in (block.mlp.fc1, block.mlp.fc2):
                init_linear(layer, bias_std=1e-6)
        for zeros in (self.own_head, self.head_bias):
            if zeros is not None:
                nn.init.zeros_(zeros)
