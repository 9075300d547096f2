"""What the decoder is asked: three kinds of texts about an image (LocCa, section 3.1).

    captioning            "Cap: {caption}"
    referring expression  "ARef: {phrase} : {box}"
    grounded captioning   "GCap: {box} : {phrase}"

Boxes are integers as plain text. The loss covers all that follows the first word, so either of
box and phrase is learned in both. Box order and range are not published for SigLIP 2: "ymin xmin
ymax xmax" from 0 to 500 unless a decoder is made for other numbers.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Task = Literal["caption", "refer", "ground"]
TASKS: tuple[Task, ...] = ("caption", "refer", "ground")
PREFIXES: dict[Task, str] = {"caption": "Cap:", "refer": "ARef:", "ground": "GCap:"}
MAX_COORDINATE = 500  # LocCa: "up to 500"
SEPARATOR = " : "
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the sides


class Encoder(Protocol):
    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class TaskText(NamedTuple):
    """One text in tokens; `prefix` of them are given, not guessed."""

    task: Task
    ids: tuple[int, ...]  # with the end token where there was room
    prefix: int
    is_parallel: bool = False  # its tokens are guessed all at once, from mask tokens


class ImageTexts(NamedTuple):
    """What is to be said of one image, in words."""

    caption: str | None = None
    phrase: str | None = None
    box: Box | None = None  # of the phrase; without one of both only the caption counts


def box_to_text(box: Box, max_coordinate: int = MAX_COORDINATE) -> str:
    """ "ymin xmin ymax xmax", whole numbers from 0 to `max_coordinate`.

    Raises ValueError for a box that is empty, inverted, not finite or outside the image.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"need a box (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1, y alike; got {box}")
    return " ".join(str(round(max_coordinate * c)) for c in (y0, x0, y1, x1))


def text_to_box(text: str, max_coordinate: int = MAX_COORDINATE) -> Box | None:
    """The first four numbers of a text as a box; None where they are none."""
    numbers = [int(n) for n in re.findall(r"\d+", text)[:4]]
    if len(numbers) < 4 or max(numbers) > max_coordinate:
        return None
    y0, x0, y1, x1 = (n / max_coordinate for n in numbers)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def prompts(task: Task, given: Sequence[str], encoder: Encoder) -> list[list[int]]:
    """Tokens that texts of this task begin with, as in training.

    `given` are phrases, boxes as text, or empty strings for captions.
    """
    start = _without_end(encoder.encode([PREFIXES[task]])[0], encoder)
    # No space behind: it belongs to the token that comes next.
    bodies = encoder.encode([f"{text}{SEPARATOR}".rstrip() if text else "" for text in given])
    return [start + _without_end(body, encoder) for body in bodies]


def _without_end(ids: list[int], encoder: Encoder) -> list[int]:
    return [i for i in ids if i != encoder.eos_id]


def task_texts(
    image: ImageTexts, encoder: Encoder, length: int, max_coordinate: int = MAX_COORDINATE
) -> list[TaskText]:
    """An image's texts in tokens, at most `length` each; without phrase or box the caption alone.

    Raises ValueError for a box that is none.
    """
    said: list[tuple[Task, str]] = []
    if image.caption is not None:
        said.append(("caption", image.caption))
    if image.phrase is not None and image.box is not None:
        box = box_to_text(image.box, max_coordinate)
        said.append(("refer", f"{image.phrase}{SEPARATOR}{box}"))
        said.append(("ground", f"{box}{SEPARATOR}{image.phrase}"))
    # Apart, so that where the prefix ends does not depend on what follows it.
    prefixes = encoder.encode([PREFIXES[task] for task, _ in said])
    bodies = encoder.encode([text for _, text in said])
    texts = []
    for (task, _), prefix, body in zip(said, prefixes, bodies, strict=True):
        start = _without_end(prefix, encoder)
        ids = [*start, *body]
        if len(ids) > length:
            ids = [*ids[: length - 1], encoder.eos_id]
        texts.append(TaskText(task, tuple(ids), len(start)))
    return texts
