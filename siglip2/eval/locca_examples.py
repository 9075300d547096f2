"""Pictures with the boxes a decoder says and the true ones, and captions said and true.

A JSON file and PNGs in the run's folder, as the gallery's: a report is made of these files alone.
"""

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from siglip2.data.images import decode_image
from siglip2.data.regions import Box
from siglip2.errors import DataError, require
from siglip2.eval.grounding import IS_FOUND
from siglip2.eval.localization import box_iou
from siglip2.eval.locca import LocCaResult
from siglip2.files import write_atomic
from siglip2.locca.commands import Speaker, answer
from siglip2.locca.tasks import text_to_box

FOLDER, FILE = "locca", "examples.json"
SIDE_PX = 480  # of a picture's longer side: larger than shown, for dense screens
TRUE, FOUND = (27, 122, 85), (190, 40, 150)  # green and magenta: told apart without green and red
_PEN_PX, _THIN_PX, _DASH_PX = 4, 2, 14


class SourceExamples(NamedTuple):
    """What to show of one source; `pictures` are PNGs by example key.

    `images`: key; regions (phrase, language, box, found, said_box, iou, right); caption: said, and
    true in the language nearest to it.
    """

    name: str
    images: list[dict[str, Any]]
    pictures: dict[str, bytes]


class LocCaExamples(NamedTuple):
    sources: list[SourceExamples]

    def save(self, folder: str | Path) -> Path:
        """Write examples.json and PNGs into `folder`, replacing those it holds."""
        folder = Path(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        out = []
        for source in self.sources:
            files = {}
            for key, data in source.pictures.items():
                files[key] = f"{hashlib.sha256(data).hexdigest()[:16]}.png"
                (folder / files[key]).write_bytes(data)
            out.append({**source._asdict(), "pictures": files})
        write_atomic(folder / FILE, json.dumps(out, ensure_ascii=False, indent=1))
        return folder / FILE


def load_examples(folder: str | Path) -> LocCaExamples:
    """Those saved in `folder`, none if there are none. Raises DataError if they are damaged."""
    path = Path(folder) / FILE
    if not path.is_file():
        return LocCaExamples([])
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))
        for fields in sources:
            files = fields["pictures"].items()
            fields["pictures"] = {key: (path.parent / file).read_bytes() for key, file in files}
        return LocCaExamples([SourceExamples(**fields) for fields in sources])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"cannot read {path} ({error}): run the evaluation again") from error


def collect_examples(
    speaker: Speaker | None, sources: Mapping[str, Any], results: Mapping[str, LocCaResult]
) -> LocCaExamples:
    """Pictures of the images that `evaluate_locca` drew, with captions; none without a speaker."""
    out = []
    most = speaker.decoder.config.max_coordinate if speaker else 0
    for name, result in results.items() if speaker else ():
        wanted = {example["key"]: example["regions"] for example in result.examples}
        found = {x.key: x for x in _examples(sources[name], set(wanted))}
        found = {key: found[key] for key in wanted if key in found}
        files = [example.image for example in found.values()]
        said = answer(speaker, files, "caption", [""] * len(files), names=list(found))
        images, pictures = [], {}
        for (key, example), text in zip(found.items(), said, strict=True):
            regions = [_judged(region, most) for region in wanted[key]]
            caption = {"said": text, **_nearest(text, example.captions)}
            images.append({"key": key, "regions": regions, "caption": caption})
            boxes = [(region["box"], region["found"]) for region in regions]
            pictures[key] = draw_boxes(example.image, boxes)
        out.append(SourceExamples(name, images, pictures))
    return LocCaExamples(out)


def _examples(source: Any, keys: set[str]) -> Iterator[Any]:
    from siglip2.data.sources import iterate
    from siglip2.data.types import Example

    missing = set(keys)
    for example in iterate(source) if missing else ():
        if isinstance(example, Example) and example.key in missing:
            missing.remove(example.key)
            yield example
            if not missing:
                return


def _judged(region: Mapping[str, Any], max_coordinate: int) -> dict[str, Any]:
    found = text_to_box(region["said_box"], max_coordinate)
    boxes = (torch.tensor([box or (0.0,) * 4]).double() for box in (found, region["box"]))
    iou = float(box_iou(*boxes))
    return {**region, "found": found and list(found), "iou": iou, "right": iou >= IS_FOUND}


def _nearest(said: str, captions: Mapping[str, str]) -> dict[str, str]:
    """The true caption that shares most words with what was said, and its language.

    No prompt says in which language a caption is wanted.
    """
    words = Counter(said.lower().split())

    def shared(language: str) -> tuple[int, bool]:
        return (words & Counter(captions[language].lower().split())).total(), language == "en"

    language = max(sorted(captions), key=shared, default="")
    return {"true": captions.get(language, ""), "language": language}


def draw_boxes(
    picture: bytes,  # encoded
    boxes: Sequence[tuple[Box, Box | None]],  # true, found
) -> bytes:
    """A PNG of SIDE_PX at most: true boxes in whole lines, found ones dashed over them.

    A thin line joins the centres of a found box and the one it should be.
    """
    Image, pen = require("PIL.Image", "data"), require("PIL.ImageDraw", "data")
    image = decode_image(picture)
    scale = SIDE_PX / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    draw = pen.Draw(image)
    for true, _ in boxes:
        draw.rectangle(_pixels(true, size), outline=TRUE, width=_PEN_PX)
    for true, found in boxes:
        if found is not None:
            ends = [_centre(_pixels(box, size)) for box in (found, true)]
            draw.line(ends, fill=FOUND, width=_THIN_PX)
            _dashed(draw, _pixels(found, size))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _pixels(box: Box, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Corners that are both on the box."""
    x0, y0, x1, y1 = (round(c * side) for c, side in zip(box, (*size, *size), strict=True))
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _centre(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return (box[0] + box[2]) // 2, (box[1] + box[3]) // 2


def _dashed(draw: Any, box: tuple[int, int, int, int]) -> None:
    """A box of dashes, the first of each side at its start."""
    x0, y0, x1, y1 = box
    inner = _PEN_PX - 1
    for x in range(x0, x1 + 1, 2 * _DASH_PX):
        end = min(x + _DASH_PX, x1)
        draw.rectangle((x, y0, end, min(y0 + inner, y1)), fill=FOUND)
        draw.rectangle((x, max(y0, y1 - inner), end, y1), fill=FOUND)
    for y in range(y0, y1 + 1, 2 * _DASH_PX):
        end = min(y + _DASH_PX, y1)
        draw.rectangle((x0, y, min(x0 + inner, x1), end), fill=FOUND)
        draw.rectangle((max(x0, x1 - inner), y, x1, end), fill=FOUND)
