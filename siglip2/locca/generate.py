"""Texts for images, a token at a time, with keys and values kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip2_kernels import make_plan

from ..models.decoder import Decoder
from .packing import BEGIN


@torch.no_grad()
def generate(
    decoder: Decoder,
    vision: Tensor,  # (S, Dv) un-pooled tokens of all images
    vision_lengths: Sequence[int],
    prompts: Sequence[Sequence[int]],  # tokens of each image's text that are given
    *,
    eos_id: int,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """What follows each prompt, without the end token.

    Args:
        max_length: Tokens of a text, its prompt included; None takes the decoder's positions.
        temperature: 0 takes the likeliest token; else tokens are drawn.
        top_p: Drawn from the fewest tokens whose probabilities sum to this.

    Raises ValueError: prompts of another number than images, or longer than `max_length`.
    """
    length = min(max_length or decoder.config.length, decoder.config.length)
    _check(prompts, vision_lengths, length, temperature, top_p)
    N, device, config = len(prompts), vision.device, decoder.config
    H, E = config.size.num_heads, config.size.width // config.size.num_heads
    plan = make_plan([1] * N, vision_lengths, device=device)
    keys_and_values = [block.cross.keys_and_values(vision) for block in decoder.blocks]
    caches = [vision.new_empty(2, N, H, length, E) for _ in decoder.blocks]
    given = torch.full((N, length), -1, dtype=torch.int64)
    for row, prompt in zip(given, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
    given = given.to(device)
    texts = torch.full((N, length), eos_id, dtype=torch.int64, device=device)
    newest = torch.full((N,), BEGIN, dtype=torch.int64, device=device)
    is_done = torch.zeros(N, dtype=torch.bool, device=device)
    head = decoder.head.to(vision.dtype)  # once, not for each token: it is the largest matrix
    for place in range(length if N else 0):
        x = decoder.embed(newest, torch.full_like(newest, place), vision.dtype)
        for block, kv, cache in zip(decoder.blocks, keys_and_values, caches, strict=True):
            x = block.step(x, kv, plan, cache, place)
        drawn = _draw(
            _logits(decoder.norm(x), head, decoder.head_bias), temperature, top_p, generator
        )
        is_given = given[:, place] >= 0
        newest = torch.where(is_given, given[:, place], drawn)
        newest = torch.where(is_done, eos_id, newest)
        is_done |= (newest == eos_id) & ~is_given
        texts[:, place] = newest
        if bool(is_done.all()):
            break
    return [_after(text, len(p), eos_id) for text, p in zip(texts.tolist(), prompts, strict=True)]


def _check(
    prompts: Sequence[Sequence[int]],
    vision_lengths: Sequence[int],
    length: int,
    temperature: float,
    top_p: float,
) -> None:
    if len(prompts) != len(vision_lengths):
        got = f"{len(prompts)} for {len(vision_lengths)}"
        raise ValueError(f"need a prompt for each image; got {got}")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest >= length:
        raise ValueError(f"need prompts of fewer than {length} tokens; got {longest}")
    if temperature < 0 or not 0 < top_p <= 1:
        got = f"{temperature} and {top_p}"
        raise ValueError(f"need temperature >= 0 and top_p in (0, 1]; got {got}")


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None
) -> Tensor:  # (N, D), (V, D) -> (N, V), at least float32
    logits = hidden @ head.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits + bias


def _draw(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:  # (N,) int64
    if temperature == 0:
        return logits.argmax(-1)
    p, tokens = (logits / temperature).softmax(-1).sort(descending=True, dim=-1)
    # The first is always kept: what lies before a token is what must stay below top_p.
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return tokens.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def _after(text: list[int], start: int, eos_id: int) -> list[int]:
    text = text[start:]
    return text[: text.index(eos_id)] if eos_id in text else text
