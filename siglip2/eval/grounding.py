"""Boxes for phrases and phrases for boxes, asked of a decoder and compared with what is true."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip2.data.regions import Box, Region
from siglip2.eval.localization import (
    accuracy_at,
    best_constant_accuracy,
    best_constant_iou,
    box_iou,
)
from siglip2.locca.generate import generate
from siglip2.locca.tasks import MAX_COORDINATE, Task, box_to_text, prompts, text_to_box
from siglip2.models.decoder import Decoder

IS_FOUND = 0.5  # intersection over union at which a box counts as found


class Asked(NamedTuple):
    """One region, one of its phrases, and what the decoder said of either."""

    key: str  # of the image
    phrase: str
    language: str
    box: Box
    phrases: tuple[str, ...]  # in all languages
    said_box: str
    said_phrase: str


class _Question(NamedTuple):
    image: int  # in the batch
    language: str
    region: Region

    @property
    def phrase(self) -> str:
        return self.region.phrases[self.language]


def ask_regions(
    decoder: Decoder,
    tokenizer: Any,
    keys: Sequence[str],
    regions: Sequence[Sequence[Region]],  # of each image
    vision: Tensor,  # (S, Dv) un-pooled tokens of all images
    vision_lengths: Sequence[int],
    *,
    batch_size: int,
    seed: int,
) -> list[Asked]:
    """Greedy answers for every region that has a phrase; which language is asked for, `seed` draws.

    The draw depends on the image's key and the region's number alone.
    """
    questions = [
        _Question(image, _draw(found, seed, keys[image], number), found)
        for image, of_image in enumerate(regions)
        for number, found in enumerate(of_image)
        if found.phrases
    ]
    parts, out = vision.split(list(vision_lengths)), []
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        seen = [parts[question.image] for question in some]
        phrases = [question.phrase for question in some]
        boxes = [
            box_to_text(question.region.box, decoder.config.max_coordinate) for question in some
        ]
        said_boxes = _answers("refer", phrases, decoder, tokenizer, seen)
        said_phrases = _answers("ground", boxes, decoder, tokenizer, seen)
        for question, said_box, said_phrase in zip(some, said_boxes, said_phrases, strict=True):
            image, language, region = question
            names = tuple(region.phrases.values())
            known = (keys[image], question.phrase, language, region.box, names)
            out.append(Asked(*known, said_box, said_phrase))
    return out


def _draw(region: Region, seed: int, key: str, number: int) -> str:
    return random.Random(f"{seed}/{key}/{number}").choice(sorted(region.phrases))


def _answers(
    task: Task, given: Sequence[str], decoder: Decoder, tokenizer: Any, seen: Sequence[Tensor]
) -> list[str]:
    """What follows each prompt; nothing where a prompt leaves no room for an answer."""
    asked = prompts(task, given, tokenizer)
    rows = [i for i, prompt in enumerate(asked) if len(prompt) < decoder.config.length]
    said = [""] * len(asked)
    if rows:
        found = generate(
            decoder,
            torch.cat([seen[i] for i in rows]),
            [len(seen[i]) for i in rows],
            [asked[i] for i in rows],
            eos_id=tokenizer.eos_id,
        )
        for i, ids in zip(rows, found, strict=True):
            said[i] = tokenizer.decode(ids)
    return said


def box_scores(asked: Sequence[Asked], max_coordinate: int = MAX_COORDINATE) -> dict[str, Any]:
    """Referring expressions: how often and how well boxes are found, beside one box for all."""
    true = torch.tensor([found.box for found in asked], dtype=torch.float64)
    boxes = [text_to_box(found.said_box, max_coordinate) for found in asked]
    guessed = torch.tensor([box or (0.0,) * 4 for box in boxes], dtype=torch.float64)
    return {
        "num_regions": len(asked),
        "accuracy": accuracy_at(boxes, true, IS_FOUND),
        "constant_accuracy": best_constant_accuracy(true, IS_FOUND),
        "mean_iou": float(box_iou(guessed, true).mean()),
        "constant_mean_iou": best_constant_iou(true),
        "are_boxes": sum(box is not None for box in boxes) / len(boxes),
    }


def phrase_scores(asked: Sequence[Asked], tokenizer: Any) -> dict[str, Any]:
    """Grounded captioning: exact matches, beside one phrase for all.

    No prompt says which language is wanted, so a phrase in any of the region's languages is also
    counted (`exact_any`).
    """
    distinct = {text for found in asked for text in found.phrases}
    plain = {text: _plain(text, tokenizer) for text in distinct}
    said = [" ".join(found.said_phrase.split()) for found in asked]
    drawn = [{plain[found.phrase]} for found in asked]
    every = [{plain[text] for text in found.phrases} for found in asked]
    return {
        "num_regions": len(asked),
        "exact": _share(said, drawn),
        "constant_exact": _constant_share(drawn),
        "exact_any": _share(said, every),
        "constant_exact_any": _constant_share(every),
    }


def _plain(text: str, tokenizer: Any) -> str:
    """As the tokenizer spells it: what a decoder that says it is printed as."""
    return " ".join(tokenizer.decode(tokenizer.encode([text])[0]).split())


def _share(said: Sequence[str], right: Sequence[set[str]]) -> float:
    return sum(text in texts for text, texts in zip(said, right, strict=True)) / len(said)


def _constant_share(right: Sequence[set[str]]) -> float:
    counts = Counter(text for texts in right for text in texts)
    return max(counts.values()) / len(right)
