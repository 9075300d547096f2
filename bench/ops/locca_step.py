"""A training step of the LocCa decoder alone: B images of N vision tokens, three texts each.

Texts are as long as captions are, about 40 % of the decoder's 64 tokens. Every rival takes the same
float32 weights, and the batch as its own loader leaves it. Liger's fused head is no rival here: it
has no weight for each token, which the mean over texts needs.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from siglip2.locca.loss import LocCaLoss
from siglip2.locca.packing import PackedTexts
from siglip2.locca.tasks import TASKS, TaskText
from siglip2.models.decoder import Decoder, DecoderConfig
from siglip2.models.presets import TowerSize

from ..case import Case, Cost, Mode, Rival
from ..plain_decoder import (
    OrderedTexts,
    PaddedTexts,
    decode_packed,
    decode_padded,
    packed_loss,
    padded_loss,
)
from ..plain_layers import torch_varlen
from ..plain_texts import ordered_texts, padded_texts

LENGTH = 64
# Shortest and longest text, mean 25.5: captions vary; the others are a box of up to 15 tokens, a
# phrase, and what stands between them.
LENGTHS = {"caption": (8, 43), "refer": (20, 31), "ground": (20, 31)}
PREFIX = {"caption": 2, "refer": 3, "ground": 3}  # tokens of "Cap:", "ARef:", "GCap:"
HEADS = {768: 12, 1152: 16}  # of the released text towers
MLP_WIDTHS = {768: 3072, 1152: 4304}


class Batch(NamedTuple):
    """The same texts in three forms."""

    config: DecoderConfig
    num_images: int
    packed: PackedTexts
    padded: tuple[PaddedTexts, ...]  # of each task
    ordered: OrderedTexts


@cache
def config_of(D: int, depth: int, V: int) -> DecoderConfig:
    size = TowerSize(
        width=D, depth=depth, mlp_width=MLP_WIDTHS.get(D, 2 * D), num_heads=HEADS.get(D, D // 64)
    )
    return DecoderConfig(size=size, vision_width=D, vocab_size=V, length=LENGTH)


@cache
def _loss(config: DecoderConfig) -> LocCaLoss:
    with torch.device("meta"):
        return LocCaLoss(Decoder(config))


def texts_of(B: int, V: int) -> list[list[TaskText]]:
    """Of each image; every other caption is guessed all at once."""
    rng = np.random.default_rng(0)
    texts = []
    for image in range(B):
        texts.append([])
        for task in TASKS:
            low, high = LENGTHS[task]
            ids = rng.integers(1, V, rng.integers(low, high, endpoint=True)).tolist()
            is_parallel = task == "caption" and image % 2 == 0
            texts[-1].append(TaskText(task, tuple(ids), PREFIX[task], is_parallel))
    return texts


def make(
    *,
    B: int,
    N: int,
    D: int,
    depth: int,
    V: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> list:
    """Vision tokens, texts, and the decoder's weights."""
    config, images = config_of(D, depth, V), texts_of(B, V)
    loss = _loss(config)
    batch = Batch(
        config,
        B,
        loss.pack_tokens(images, [N] * B, device=device),
        tuple(padded_texts(texts, LENGTH, V, device) for texts in zip(*images, strict=True)),
        ordered_texts(images, N, V, device),
    )
    draw = partial(torch.randn, device=device, generator=generator)
    vision = draw(B * N, D).to(dtype).requires_grad_()
    weights = []
    for name, parameter in loss.decoder.named_parameters():
        # Rows of unit variance keep activations so; tokens as CapPa has them.
        spread = 1.0 if name == "token_embed" or parameter.ndim < 2 else parameter.shape[1] ** -0.5
        value = draw(parameter.shape).mul_(0.1 if parameter.ndim < 2 else spread)
        is_scale = "norm" in name and name.endswith("weight")
        weights.append(value.add_(1.0 if is_scale else 0.0).requires_grad_())
    return [vision, batch, *weights]


def _named(batch: Batch, weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = [name for name, _ in _loss(batch.config).decoder.named_parameters()]
    return dict(zip(names, weights, strict=True))


def siglip2(*, compiled: bool = False) -> Callable[..., Tensor]:
    """`LocCaLoss` as it is."""

    def loss(module: LocCaLoss, state: Mapping[str, Tensor], vision, packed) -> Tensor:
        return functional_call(module, state, (vision, packed)).loss

    loss = torch.compile(loss) if compiled else loss

    def run(vision: Tensor, batch: Batch, *weights: Tensor) -> Tensor:
        state = {f"decoder.{name}": w for name, w in _named(batch, weights).items()}
        return loss(_loss(batch.config), state, vision, batch.packed)

    return run


def three_calls(*, compiled: bool = False) -> Callable[..., Tensor]:
    """Padded texts, a call of the decoder and float32 logits for each task."""
    compile_ = partial(torch.compile, dynamic=False) if compiled else lambda f: f
    decode, loss = compile_(decode_padded), compile_(padded_loss)

    def run(vision: Tensor, batch: Batch, *weights: Tensor) -> Tensor:
        size = batch.config.size
        w = {name: x.to(vision.dtype) for name, x in _named(batch, weights).items()}
        vision = vision.unflatten(0, (batch.num_images, -1))
        total = vision.new_zeros((), dtype=torch.promote_types(vision.dtype, torch.float32))
        for texts in batch.padded:
            hidden = decode(w, texts.ids, texts.allowed, vision, size.depth, size.num_heads)
            total = total + loss(w, hidden, texts.target)
        return total

    return run


def one_call(head: str) -> Callable[..., Tensor]:
    """The best of public parts: packed, `torch.nn.attention.varlen`, compiled; one head of two."""
    attend = torch_varlen()
    decode = torch.compile(partial(decode_packed, attend=attend), dynamic=False)
    loss = torch.compile(packed_loss, dynamic=False) if head == "logits" else _cut_cross_entropy()

    def run(vision: Tensor, batch: Batch, *weights: Tensor) -> Tensor:
        size, texts = batch.config.size, batch.ordered
        w = {name: x.to(vision.dtype) for name, x in _named(batch, weights).items()}
        return loss(w, decode(w, texts, vision, size.depth, size.num_heads), texts)

    return run


def _cut_cross_entropy() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy as cce

    def loss(w: Mapping[str, Tensor], hidden: Tensor, texts: OrderedTexts) -> Tensor:
        options = {"bias": w["head_bias"], "reduction": "none"}
        return (cce(hidden, w["own_head"], texts.target, **options) * texts.weight).sum()

    return loss


def bytes_a_logit(forward: float, full: float, *, of_padded: bool) -> Callable[..., float]:
    """Least memory of an implementation that holds something for each token's logits."""

    def min_bytes(mode: Mode, *, B: int, V: int, dtype: torch.dtype, **_: int) -> float:
        counted = sum(len(t.ids) - t.prefix for image in texts_of(B, V) for t in image)
        tokens = B * LENGTH if of_padded else counted
        return tokens * V * (forward if mode == "forward" else full)

    return min_bytes


def cost(*, B: int, N: int, D: int, depth: int, V: int, dtype: torch.dtype) -> dict[str, Cost]:
    """Useful FLOPs: padding, prefixes in the head and a second K and V count nothing."""
    texts, M = [t for image in texts_of(B, V) for t in image], config_of(D, depth, V).size.mlp_width
    T, C = sum(len(t.ids) for t in texts), sum(len(t.ids) - t.prefix for t in texts)
    pairs = sum(n * n if t.is_parallel else n * (n + 1) / 2 for t in texts for n in [len(t.ids)])
    block = 2 * T * (6 * D * D + 2 * D * M) + 2 * B * N * 2 * D * D + 4 * D * (pairs + T * N)
    flops = depth * block + 2 * C * V * D
    weights = (depth * (8 * D * D + 2 * D * M) + V * D) * 4
    vision = B * N * D * dtype.itemsize
    return {
        "forward": Cost(flops=flops, num_bytes=weights + vision),
        "full": Cost(flops=3 * flops, num_bytes=2 * (weights + vision) + 4 * V * D),
    }


_SMALL = {"B": 4, "N": 9, "D": 128, "depth": 2, "V": 1000}
_REAL = {"N": 256, "V": 256_000}
_CCE = {"module": "cut_cross_entropy", "pip": "cut-cross-entropy", "needs_cuda": True}

# Bytes a logit of eager: the log-softmax of each of the three calls lives until the backward, which
# holds its gradient and that of the logits beside. compile keeps the products and makes a gradient.
CASE = Case(
    x_name="B",
    x_label="images",
    shapes=[
        _SMALL,
        {"B": 64, **_REAL, "D": 768, "depth": 6},
        {"B": 256, **_REAL, "D": 768, "depth": 6},
        {"B": 64, **_REAL, "D": 1152, "depth": 13},
    ],
    check_shapes={"cpu": _SMALL, "cuda": {"B": 6, "N": 256, "D": 768, "depth": 2, "V": 32_003}},
    make=make,
    reference=three_calls(),
    rivals={
        "eager": Rival(build=three_calls, min_bytes=bytes_a_logit(8, 20, of_padded=True)),
        "compile": Rival(
            build=partial(three_calls, compiled=True),
            min_bytes=bytes_a_logit(2, 8, of_padded=True),
        ),
        "siglip2": Rival(build=siglip2, is_ours=True),
        "siglip2-compile": Rival(build=partial(siglip2, compiled=True), is_ours=True),
        "packed-compile": Rival(
            build=partial(one_call, "logits"),
            needs_cuda=True,
            min_bytes=bytes_a_logit(2, 4, of_padded=False),
        ),
        "packed-cut-cross-entropy": Rival(build=partial(one_call, "cut-cross-entropy"), **_CCE),
    },
    cost=cost,
)
