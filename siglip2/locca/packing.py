"""Texts of many images in one packed decoder pass."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from siglip2_kernels import make_plan

from ..models.decoder import Texts
from ..models.sequences import ragged
from .tasks import TASKS, Task, TaskText

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


class Totals(NamedTuple):
    """What the means of the loss divide by, for each task."""

    texts: dict[Task, float]  # that have something to guess
    tokens: dict[Task, float]  # that are guessed


def count_texts(images: Sequence[Sequence[TaskText]]) -> Totals:
    """Totals of a batch; a part of it is packed with those of the whole."""
    texts, tokens = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for text in (text for image in images for text in image):
        guessed = len(text.ids) - text.prefix
        texts[text.task] += guessed > 0
        tokens[text.task] += guessed
    return Totals(texts, tokens)


def draw_parallel(
    texts: Sequence[TaskText], share: float, rng: np.random.Generator
) -> list[TaskText]:
    """`share` of captions is guessed all at once, without a causal mask (SigLIP 2, section 2.2)."""
    return [
        text._replace(is_parallel=bool(rng.random() < share)) if text.task == "caption" else text
        for text in texts
    ]


def pack_texts(
    images: Sequence[Sequence[TaskText]],
    vision_lengths: Sequence[int],
    *,
    mask_id: int,
    per_token: bool = False,
    totals: Totals | None = None,
    device: torch.device | str | None = None,
) -> PackedTexts:
    """All texts of all images, in order.

    Args:
        vision_lengths: Vision tokens of each image.
        per_token: Every token of a task counts alike; else every text, as published.
        totals: Of the batch that these images are a part of; None: they are all of it.

    Raises ValueError when images and lengths differ in number.
    """
    if len(images) != len(vision_lengths):
        got = f"{len(images)} and {len(vision_lengths)}"
        raise ValueError(f"need texts and vision tokens of as many images; got {got}")
    flat = [text for image in images for text in image]
    arrays, lengths = _arrays(flat, mask_id), [len(text.ids) for text in flat]
    shares = _shares(flat, totals or count_texts(images), per_token=per_token)
    weight = np.where(arrays.pop("is_guessed"), np.repeat(shares, lengths), 0.0)
    arrays |= {"weight": weight.astype(np.float32), "counted": np.flatnonzero(weight)}
    of_images = [sum(len(text.ids) for text in image) for image in images]
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
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


def _arrays(texts: Sequence[TaskText], mask_id: int) -> dict[str, np.ndarray]:
    """What the decoder and its loss read of every token, and each text's lookahead."""
    lengths = np.array([len(text.ids) for text in texts], dtype=np.int64)
    is_parallel = np.array([text.is_parallel for text in texts], dtype=bool)
    prefixes = np.array([text.prefix for text in texts], dtype=np.int64)
    tasks = np.array([TASKS.index(text.task) for text in texts], dtype=np.int64)
    T = int(lengths.sum())
    target = np.fromiter(chain.from_iterable(text.ids for text in texts), np.int64, T)
    positions = np.arange(T) - np.repeat(lengths.cumsum() - lengths, lengths)
    before = np.where(positions == 0, BEGIN, np.roll(target, 1))
    return {
        "ids": np.where(np.repeat(is_parallel, lengths), mask_id, before),
        "target": target,
        "task": np.repeat(tasks, lengths),
        "positions": positions,
        "lookahead": np.where(is_parallel, lengths, 0).astype(np.int32),
        "is_guessed": positions >= np.repeat(prefixes, lengths),
    }


def _shares(texts: Sequence[TaskText], totals: Totals, *, per_token: bool) -> list[float]:
    """Weight of a guessed token of each text, such that those of a task sum to 1."""
    shares = []
    for text in texts:
        n = len(text.ids) - text.prefix
        total = totals.tokens[text.task] if per_token else totals.texts[text.task] * n
        shares.append(1 / total if n else 0.0)
    return shares
