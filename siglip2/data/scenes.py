"""Scenes made of the quick start's drawings: boxes known exactly, captions that say what is where.

A scene is a function of (seed, number) and is drawn when it is asked for; stored is its vocabulary
alone, of which every number is one token.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from siglip2.data.regions import Box, Region
from siglip2.data.sources import IndexedSource
from siglip2.data.types import Example
from siglip2.errors import DataError, require

# left, right, top, bottom, middle: the words of the quick start's languages
_WORDS = {
    "ar": ("يسار", "يمين", "أعلى", "أسفل", "وسط"),
    "de": ("links", "rechts", "oben", "unten", "mitte"),
    "en": ("left", "right", "top", "bottom", "middle"),
    "es": ("izquierda", "derecha", "arriba", "abajo", "centro"),
    "fa": ("چپ", "راست", "بالا", "پایین", "وسط"),
    "fr": ("gauche", "droite", "haut", "bas", "centre"),
    "id": ("kiri", "kanan", "atas", "bawah", "tengah"),
    "it": ("sinistra", "destra", "alto", "basso", "centro"),
    "ja": ("左", "右", "上", "下", "中央"),
    "ko": ("왼쪽", "오른쪽", "위", "아래", "가운데"),
    "pt": ("esquerda", "direita", "acima", "abaixo", "centro"),
    "ru": ("слева", "справа", "сверху", "снизу", "в центре"),
    "tr": ("sol", "sağ", "üst", "alt", "orta"),
    "zh": ("左", "右", "上", "下", "中"),
}
LANGUAGES = ("de", "en", "es", "fr", "ja", "zh")
VOCAB_SIZE = 4096
# What surrounds captions, names and boxes where a decoder is asked for them (siglip2.locca.tasks).
TASK_WORDS, MAX_COORDINATE = ("cap:", "aref:", "gcap:"), 500
_SIDES = (0.2, 0.5)  # of a drawing, as shares of the canvas
_TRIES = 50  # to place a drawing beside the others
_TRAIN, _HELD_OUT = range(2)  # streams of scenes: the same concepts in other places
# Pictures keep their white; on a canvas as white the positions of its empty patches would be a
# tenth of what their pixels are, and no box was learned in 2,400 steps.
CANVAS, WHITE = 128, 255


class Drawing(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) uint8 on white
    names: dict[str, str]
    group: str


class Scene(NamedTuple):
    pixels: np.ndarray  # (S, S, 3) uint8
    regions: tuple[Region, ...]  # from left to right
    groups: tuple[str, ...]  # of each region


class Scenes(IndexedSource):
    """`count` scenes of one to `most` of the drawings of `source`.

    Args:
        concepts: Of how many groups: the first of the source.
        languages: Of captions and names, of those of the quick start.
        held_out: Other scenes than in training, of the same concepts.

    Raises DataError: fewer than `most` concepts have names in the languages scenes speak.
    """

    def __init__(
        self,
        source: IndexedSource,
        *,
        count: int = 1_000_000,
        concepts: int = 48,
        most: int = 3,
        canvas_px: int = 96,
        languages: Sequence[str] = LANGUAGES,
        seed: int = 0,
        held_out: bool = False,
    ):
        super().__init__(f"scenes of {source.name}")
        self.tokenizer_path = source.tokenizer_path
        self.languages = sorted(languages)
        self.count, self.most, self.canvas_px, self.seed = count, most, canvas_px, seed
        self._stream = _HELD_OUT if held_out else _TRAIN
        self._drawings = _drawings(source, concepts, self.languages)
        self._scaled: dict[tuple[str, int, int], np.ndarray] = {}  # by group, style, side
        self._groups = sorted(self._drawings)
        if len(self._groups) < most:
            raise DataError(
                f"need at least {most} concepts to make scenes of; {source.name!r} has"
                f" {len(self._groups)} with names in {', '.join(self.languages)}"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        Image = require("PIL.Image", "data")
        scene = self.scene(index)
        out = io.BytesIO()
        Image.fromarray(scene.pixels).save(out, "PNG", compress_level=1)
        return Example(
            key=f"{'held-out' if self._stream else 'train'}-{index}",
            image=out.getvalue(),
            captions={language: caption(scene.regions, language) for language in self.languages},
            group=f"scene-{self._stream}-{index}",
            regions=scene.regions,
        )

    def scene(self, index: int) -> Scene:
        """Scene `index` in pixels."""
        rng = np.random.default_rng([self.seed, self._stream, index])
        canvas = np.full((self.canvas_px, self.canvas_px, 3), CANVAS, dtype=np.uint8)
        placed: list[tuple[Region, str]] = []
        chosen = rng.choice(len(self._groups), int(rng.integers(1, self.most + 1)), replace=False)
        for group in (self._groups[i] for i in chosen):
            styles = self._drawings[group]
            style = int(rng.integers(len(styles)))
            drawing = styles[style]
            box = self._place(rng, [region.box for region, _ in placed])
            if box is not None:
                x0, y0, x1, y1 = (round(self.canvas_px * c) for c in box)
                canvas[y0:y1, x0:x1] = self._scale(group, style, x1 - x0)
                placed.append((Region(drawing.names, box), group))
        placed.sort(key=lambda found: found[0].box)
        return Scene(canvas, *(tuple(column) for column in zip(*placed, strict=True)))

    def _place(self, rng: np.random.Generator, taken: list[Box]) -> Box | None:
        """Whole pixels, apart from what is there; None where no place was found."""
        S = self.canvas_px
        for _ in range(_TRIES):
            side = round(S * rng.uniform(*_SIDES))
            x, y = (int(rng.integers(S - side + 1)) for _ in range(2))
            box = (x / S, y / S, (x + side) / S, (y + side) / S)
            if all(_apart(box, other) for other in taken):
                return box
        return None

    def _scale(self, group: str, style: int, side: int) -> np.ndarray:  # (side, side, 3) uint8
        key = group, style, side
        if key not in self._scaled:
            Image = require("PIL.Image", "data")
            drawing = Image.fromarray(self._drawings[group][style].pixels)
            scaled = drawing.resize((side, side), Image.Resampling.BILINEAR)
            self._scaled[key] = np.asarray(scaled)
        return self._scaled[key]

    def texts(self) -> list[str]:
        """All that is said of scenes, in words: names, places and the numbers of boxes."""
        names = [
            name for styles in self._drawings.values() for d in styles for name in d.names.values()
        ]
        places = [" ".join(_WORDS[language]) for language in self.languages]
        return [*names, *places, *TASK_WORDS, *map(str, range(MAX_COORDINATE + 1)), ": ,"]


def write_vocabulary(scenes: Scenes, folder: Path) -> Path:
    """A tokenizer of what is said of `scenes`; made once, in a folder of its own in `folder`."""
    from siglip2.data.train_tokenizer import train_tokenizer

    texts = scenes.texts()
    name = hashlib.blake2b("\n".join(texts).encode(), digest_size=6).hexdigest()
    target = folder / f"scenes-{name}"
    if not target.is_dir():
        beside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        train_tokenizer(texts, vocab_size=VOCAB_SIZE).save(beside)
        beside.chmod(0o755)
        try:
            os.rename(beside, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
    return target / "tokenizer.json"


def caption(regions: tuple[Region, ...], language: str) -> str:
    """Every region's name and place, from left to right: "dog left top, car right"."""
    left, right, top, bottom, middle = _WORDS[language]
    said = []
    for phrases, (x0, y0, x1, y1) in regions:
        across = _third((x0 + x1) / 2, left, right)
        down = _third((y0 + y1) / 2, top, bottom)
        place = " ".join(word for word in (across, down) if word) or middle
        said.append(f"{phrases[language]} {place}")
    return ", ".join(said)


def _third(centre: float, low: str, high: str) -> str:
    if centre < 0.4:
        return low
    return high if centre > 0.6 else ""


def _apart(box: Box, other: Box) -> bool:
    return box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]


def _drawings(
    source: IndexedSource, concepts: int, languages: Sequence[str]
) -> dict[str, list[Drawing]]:
    """Drawings of each group, cut to what they show, with names in `languages`."""
    from siglip2.data.images import decode_image

    found: dict[str, list[Drawing]] = {}
    for index in range(len(source)):
        example = source[index]
        names = {x: name for x, name in example.captions.items() if x in languages}
        if len(names) < len(languages):
            continue
        if example.group not in found and len(found) == concepts:
            continue
        pixels = np.asarray(decode_image(example.image))
        drawing = Drawing(_trimmed(pixels), names, example.group)
        found.setdefault(example.group, []).append(drawing)
    return found


def _trimmed(pixels: np.ndarray) -> np.ndarray:
    """Without the white around it, squared: boxes hug what they name."""
    drawn = np.argwhere((pixels != WHITE).any(-1))
    if not len(drawn):
        return pixels
    (top, left), (bottom, right) = drawn.min(0), drawn.max(0) + 1
    side = max(bottom - top, right - left)
    out = np.full((side, side, 3), WHITE, dtype=np.uint8)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    out[y : y + bottom - top, x : x + right - left] = pixels[top:bottom, left:right]
    return out
