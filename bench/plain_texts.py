"""The texts of a LocCa batch as rivals' loaders leave them: padded, or packed by mask."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.locca.packing import BEGIN
from siglip2.locca.tasks import TaskText

from .plain_decoder import IGNORED, OrderedTexts, PaddedTexts


def _inputs(text: TaskText, V: int) -> list[int]:
    return [V] * len(text.ids) if text.is_parallel else [BEGIN, *text.ids[:-1]]


def padded_texts(
    texts: Sequence[TaskText],  # of one task
    L: int,
    V: int,
    device: str,
) -> PaddedTexts:
    B = len(texts)
    ids = torch.zeros(B, L, dtype=torch.int64)
    target = torch.full((B, L), IGNORED)
    for row, text in enumerate(texts):
        n = len(text.ids)
        ids[row, :n] = torch.tensor(_inputs(text, V))
        target[row, text.prefix : n] = torch.tensor(text.ids[text.prefix :])
    allowed = None
    if any(text.is_parallel for text in texts):
        lengths = torch.tensor([len(text.ids) for text in texts])
        is_parallel = torch.tensor([text.is_parallel for text in texts])[:, None, None]
        causal = torch.ones(L, L, dtype=torch.bool).tril()
        is_text = (torch.arange(L) < lengths[:, None])[:, None]  # (B, 1, L)
        allowed = torch.where(is_parallel, is_text, causal)[:, None].to(device)
    return PaddedTexts(ids.to(device), target.to(device), allowed)


def _bounds(lengths: list[int], device: str) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0), (1, 0)).int().to(device)


def ordered_texts(images: list[list[TaskText]], N: int, V: int, device: str) -> OrderedTexts:
    kinds = [
        [[t for t in image if t.is_parallel is kind] for image in images] for kind in (True, False)
    ]
    flat = [text for kind in kinds for image in kind for text in image]
    counts = [text for text in flat for _ in text.ids[text.prefix :]]
    weight = [1 / len(images) / (len(t.ids) - t.prefix) for t in counts]
    at, counted = 0, []
    for text in flat:
        counted += range(at + text.prefix, at + len(text.ids))
        at += len(text.ids)
    lengths_of = lambda texts: [len(text.ids) for text in texts]
    return OrderedTexts(
        torch.tensor([i for t in flat for i in _inputs(t, V)], device=device),
        torch.tensor([i for t in flat for i in range(len(t.ids))], device=device),
        torch.tensor([i for t in flat for i in t.ids[t.prefix :]], device=device),
        torch.tensor(weight, device=device),
        torch.tensor(counted, device=device),
        sum(lengths_of(t for image in kinds[0] for t in image)),
        tuple(_bounds(lengths_of(t for image in k for t in image), device) for k in kinds),
        tuple(_bounds([sum(lengths_of(image)) for image in k], device) for k in kinds),
        _bounds([N] * len(images), device),
        max(sum(lengths_of(image)) for image in images),
        N,
    )
