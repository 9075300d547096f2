"""Phrases matched to the boxes of an open-vocabulary detector: pseudo-labels for regions."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from siglip2.data.captions import UNKNOWN_LANGUAGE, base_language
from siglip2.data.ngrams import ngrams
from siglip2.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PixelBox = tuple[float, float, float, float]  # x0, y0, x1, y1, the last two behind the box
# What a detector is: of an RGB picture and phrases, (index of the phrase, score, box) of each find.
Detect = Callable[["Image", Sequence[str]], Iterable[tuple[int, float, Sequence[float]]]]
_LEAST_PX = 1.0  # sides of a box below this are noise


@dataclass(frozen=True, kw_only=True)
class BoxOptions:
    """What is asked of a detector, and what is kept of its answers. Raises ConfigError."""

    most_words: int = 10  # of an n-gram; 0: ask for the categories alone
    languages: tuple[str, ...] = ()  # of the captions that n-grams are of; (): all
    categories: tuple[str, ...] = ()  # asked of every picture, in a call of their own
    threshold: float = 0.3  # boxes with a lower score are dropped (LocCa; not published: SigLIP 2)
    most_overlap: float = 0.5  # IoU of two boxes of one phrase; not published
    most_boxes: int = 20  # a picture, those with the best scores; not published

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or not 0 <= self.most_overlap <= 1:
            raise ConfigError(
                "need a threshold and an overlap from 0 to 1; got"
                f" {self.threshold} and {self.most_overlap}"
            )
        if self.most_boxes < 1 or self.most_words < 0:
            raise ConfigError(
                "need at least 1 box a picture and 0 words a phrase; got"
                f" {self.most_boxes} and {self.most_words}"
            )
        if not self.most_words and not self.categories:
            raise ConfigError("need categories where n-grams have 0 words; got neither to ask for")


class Found(NamedTuple):
    phrases: Mapping[str, str]  # language -> what it is called
    score: float
    box: PixelBox  # within the picture


def find_regions(
    image: "Image",  # RGB
    captions: Mapping[str, str],
    detect: Detect,
    options: BoxOptions,
    counts: Counter[str],
) -> list[Found]:
    """Boxes of what the captions' n-grams and the categories name, best score first.

    N-grams and categories are asked for in separate calls: they do not compete for a box. Boxes are
    cut at the picture's edges. `counts` gains the phrases that were asked, the boxes that were
    found, and how many were dropped for what.

    Raises DataError where the detector answers with what is no box of a phrase.
    """
    found: list[Found] = []
    for asked in (
        _ngrams(captions, options),
        dict.fromkeys(options.categories, (UNKNOWN_LANGUAGE,)),
    ):
        if asked:
            counts["phrases asked"] += len(asked)
            found += _answers(image, asked, detect, options, counts)
    found.sort(key=lambda region: -region.score)
    counts["dropped: over the most a picture"] += max(len(found) - options.most_boxes, 0)
    return found[: options.most_boxes]


def _ngrams(captions: Mapping[str, str], options: BoxOptions) -> dict[str, tuple[str, ...]]:
    """Phrase -> languages it stands in, in the order of the captions."""
    found: dict[str, tuple[str, ...]] = {}
    if not options.most_words:
        return found
    for tag, text in captions.items():
        language = base_language(tag)
        if options.languages and not {language, language.split("-")[0]} & {*options.languages}:
            continue
        for phrase in ngrams(text, language, most_words=options.most_words):
            if language not in found.get(phrase, ()):
                found[phrase] = (*found.get(phrase, ()), language)
    return found


def _answers(
    image: "Image",
    asked: Mapping[str, Sequence[str]],
    detect: Detect,
    options: BoxOptions,
    counts: Counter[str],
) -> list[Found]:
    phrases = list(asked)
    boxes: dict[int, list[tuple[float, PixelBox]]] = {}
    for index, score, box in map(_checked(len(phrases)), detect(image, phrases)):
        counts["boxes found"] += 1
        x0, x1 = (min(max(c, 0.0), image.width) for c in (box[0], box[2]))
        y0, y1 = (min(max(c, 0.0), image.height) for c in (box[1], box[3]))
        if score < options.threshold:
            counts["dropped: low score"] += 1
        elif min(x1 - x0, y1 - y0) < _LEAST_PX:
            counts["dropped: empty or outside"] += 1
        else:
            boxes.setdefault(index, []).append((score, (x0, y0, x1, y1)))
    found = []
    for index in sorted(boxes):
        scores, places = zip(*boxes[index], strict=True)
        kept = suppressed(np.array(places), np.array(scores), options.most_overlap)
        counts["dropped: overlap"] += len(places) - len(kept)
        named = dict.fromkeys(asked[phrases[index]], phrases[index])
        found += [Found(named, scores[i], places[i]) for i in kept]
    return found


def _checked(num_phrases: int) -> Callable[[object], tuple[int, float, PixelBox]]:
    def check(answer: object) -> tuple[int, float, PixelBox]:
        try:
            index, score, box = answer
            index, score, box = int(index), float(score), tuple(map(float, box))
        except (TypeError, ValueError):
            box = ()
        if len(box) != 4 or not np.isfinite([score, *box]).all() or not 0 <= index < num_phrases:
            raise DataError(
                f"need a detector's (phrase index below {num_phrases}, score, (x0, y0, x1, y1));"
                f" got {answer!r}"
            )
        return index, score, box

    return check


def suppressed(
    boxes: np.ndarray,  # (N, 4) x0, y0, x1, y1
    scores: np.ndarray,  # (N,)
    most_overlap: float,  # IoU
) -> list[int]:
    """Non-maximum suppression: rows to keep, best score first, earlier rows first among equals."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (high - low).clip(min=0).prod(1)
        left = left[shared <= most_overlap * (areas[best] + areas[left] - shared)]
    return kept
