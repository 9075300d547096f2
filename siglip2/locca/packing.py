"""Texts of many images in one packed decoder pass."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from siglip2_kernels import make_plan

from ..models.decoder import Texts
from ..models.sequences import ragged
from .tasks import TASKS, TaskText

BEGIN = 0  # what precedes the first token: the padding id, as CapPa


class PackedTexts(NamedTuple):
    """One decoder pass: what goes in, and what is to come out."""

    texts: Texts
    target: Tensor  # (T,) int64
    weight: Tensor  # (T,) float32: each task's sum to 1; 0 within prefixes
    counted: Tensor  # (n,) int64: tokens of weight; the others need no logits
    task: Tensor  # (T,) int64 number in `TASKS`
    num_vision: int  # vision tokens of all images
    longest_vision: int  # vision tokens of the image with the most


def pack_texts(
    images: Sequence[Sequence[TaskText]],
    vision_lengths: Sequence[int],
    *,
    mask_id: int,
    rng: np.random.Generator,
    parallel_share: float = 0.5,
    per_token: bool = False,
    device: torch.device | str | None = None,
) -> PackedTexts:
    """All texts of all images, in order.

    Args:
        vision_lengths: Vision tokens of each image.
        parallel_share: Of captions, whose tokens are all guessed at once, from mask tokens and
            without a causal mask (SigLIP 2, section 2.2: 0.5).
        per_token: Every token of a task counts alike; else every text, as published.

    Raises ValueError when images and lengths differ in number.
    """
    if len(images) != len(vision_lengths):
        got = f"{len(images)} and {len(vision_lengths)}"
        raise ValueError(f"need texts and vision tokens of as many images; got {got}")
    flat = [text for image in images for text in image]
    lengths = [len(text.ids) for text in flat]
    is_parallel = [t.task == "caption" and bool(rng.random() < parallel_share) for t in flat]
    ids, target, weight = [], [], []
    shares = _shares(flat, per_token=per_token)
    for text, parallel, share in zip(flat, is_parallel, shares, strict=True):
        n = len(text.ids)
        ids += [mask_id] * n if parallel else [BEGIN, *text.ids[:-1]]
        target += text.ids
        weight += [0.0] * text.prefix + [share] * (n - text.prefix)
    of_images = [sum(len(text.ids) for text in image) for image in images]
    weights = torch.tensor(weight, dtype=torch.float32)
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int64),
        "target": torch.tensor(target, dtype=torch.int64),
        "weight": weights,
        "counted": torch.nonzero(weights)[:, 0],
        "task": torch.tensor([TASKS.index(t.task) for t in flat for _ in t.ids], dtype=torch.int64),
        "positions": torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int64),
        "lookahead": torch.tensor(
            [n if p else 0 for n, p in zip(lengths, is_parallel, strict=True)], dtype=torch.int32
        ),
    }
    on = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
    texts = Texts(
        on["ids"],
        on["positions"],
        ragged(lengths, on["ids"].device),
        on["lookahead"],
        make_plan(of_images, vision_lengths, device=device),
    )
    outputs = (on[name] for name in ("target", "weight", "counted", "task"))
    return PackedTexts(texts, *outputs, sum(vision_lengths), max(vision_lengths, default=0))


def _shares(texts: Sequence[TaskText], *, per_token: bool) -> list[float]:
    """Weight of a guessed token of each text, such that those of a task sum to 1."""
    guessed = [len(text.ids) - text.prefix for text in texts]
    totals = dict.fromkeys(TASKS, 0)
    for text, n in zip(texts, guessed, strict=True):
        totals[text.task] += n if per_token else n > 0
    return [
        1 / totals[text.task] / (1 if per_token else n) if n else 0.0
        for text, n in zip(texts, guessed, strict=True)
    ]
