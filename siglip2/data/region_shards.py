"""Tars of a source's images with the regions a detector found: written once, resumed by shard."""

import io
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip2.data.detect import BoxOptions, Detect, Found, find_regions
from siglip2.data.images import decode_image
from siglip2.data.sources import IndexedSource, ShardSource, Source, iterate
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import ConfigError, DataError, require

if TYPE_CHECKING:
    from PIL.Image import Image

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_TOP = 50  # phrases in the report
COUNTS = "boxes.json"


@dataclass(frozen=True)
class Counts:
    """Of a shard, or of all; files hold it as JSON."""

    examples: int = 0  # written
    without_boxes: int = 0  # of these
    boxes: int = 0
    asked: Counter[str] = field(default_factory=Counter)  # phrases, boxes found, dropped for what
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> examples
    phrases: Counter[str] = field(default_factory=Counter)  # phrase -> boxes

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, x.name) + getattr(other, x.name) for x in fields(self)))

    def as_json(self) -> dict[str, Any]:
        values = ((x.name, getattr(self, x.name)) for x in fields(self))
        return {k: dict(v.most_common()) if isinstance(v, Counter) else v for k, v in values}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Counts":
        return cls(**{k: Counter(v) if isinstance(v, dict) else v for k, v in content.items()})


@dataclass(frozen=True)
class Report:
    folder: Path
    counts: Counts
    shards: int
    done_before: int

    def __str__(self) -> str:
        """One line."""
        counts = self.counts
        skipped = ", ".join(f"{reason} {n}" for reason, n in counts.skipped.most_common())
        before = f" ({self.done_before} made before)" if self.done_before else ""
        return (
            f"{self.folder}: images {counts.examples} ({counts.without_boxes} without boxes), boxes"
            f" {counts.boxes} of {counts.asked['boxes found']} found, skipped {skipped or 'none'},"
            f" shards {self.shards}{before}; counts in {COUNTS}"
        )


def write_region_shards(
    source: Source,
    folder: Path,
    detect: Detect,
    options: BoxOptions,
    *,
    detector: str,  # its name; like the source's, what a resumed run must have in common
    source_name: str | None = None,  # None: the source's own
    examples_per_shard: int = 1000,
    part: tuple[int, int] = (0, 1),
) -> Report:
    """Webdataset tars of every image that can be read, its captions and the regions found on it.

    boxes-NNNNNN.tar holds examples N * examples_per_shard and on of the source, whatever is skipped
    among them, so that a killed run loses the shard it was at and the next one goes on there. Each
    is written beside and renamed, its counts first. Regions of the source itself are left out.

    Args:
        part: (i, n): write shards i, i + n, ... alone; n processes may write one folder.

    Raises ConfigError: a wrong part or size. DataError: the folder holds boxes of another source or
    of other options, or the detector's answers are no boxes.
    """
    if examples_per_shard < 1 or not 0 <= part[0] < part[1]:
        raise ConfigError(
            f"need at least 1 example a shard and a part i/n with 0 <= i < n; got"
            f" {examples_per_shard} and {part[0]}/{part[1]}"
        )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"need a folder to write to; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    known = None if isinstance(source, ShardSource) else len(source)
    identity = {
        "source": source_name or source.name,
        "source_examples": known,
        "examples_per_shard": examples_per_shard,
        "detector": detector,
        **asdict(options),
    }
    _check_identity(folder, json.loads(json.dumps(identity)))
    total, done, made = Counts(), 0, 0
    with _progress(known) as advance:
        for number, examples in _chunks(source, examples_per_shard):
            path = folder / f"boxes-{number:06d}.tar"
            is_done = path.is_file()  # before, or by another part
            if not is_done and number % part[1] == part[0]:
                _write_shard(path, map(advance, examples), detect, options)
                made += 1
            else:
                advance(None, examples_per_shard)
                done += is_done
            if path.is_file():
                total += Counts.read(json.loads(path.with_suffix(".json").read_text("utf-8")))
    report = Report(folder, total, made + done, done)
    top = dict(total.phrases.most_common(_TOP))
    content = {**identity, "shards": report.shards, **total.as_json(), "phrases": top}
    _write_json(folder / COUNTS, content)
    return report


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    path = folder / COUNTS
    if not path.is_file():
        if any(folder.glob("boxes-*.tar")):
            raise DataError(f"{folder} holds tars but no {COUNTS}: name another folder")
        _write_json(path, identity)
        return
    before = json.loads(path.read_text("utf-8"))
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in identity.items() if before.get(k) != v]
    if changed:
        raise DataError(
            f"{folder} holds boxes made otherwise: {'; '.join(changed)}. Use the same options to go"
            " on with it, or another folder"
        )


def _chunks(source: Source, size: int) -> Iterator[tuple[int, Iterable[Example | BadSampleError]]]:
    """Number and examples of each shard; what is not taken of one is passed over."""
    if not isinstance(source, ShardSource):
        for number, start in enumerate(range(0, len(source), size)):
            yield number, map(partial(_read, source), range(start, min(start + size, len(source))))
        return
    stream, number = iterate(source), 0
    while (first := next(stream, None)) is not None:
        chunk = chain([first], islice(stream, size - 1))
        yield number, chunk
        deque(chunk, maxlen=0)
        number += 1


def _read(source: IndexedSource, index: int) -> Example | BadSampleError:
    try:
        return source[index]
    except BadSampleError as error:
        return error


def _write_shard(
    path: Path,
    examples: Iterable[Example | BadSampleError],
    detect: Detect,
    options: BoxOptions,
) -> None:
    wds = require("webdataset", "data")
    beside = path.with_name(f".{path.name}.partial")
    written = without = boxes = 0
    asked, skipped, phrases = Counter(), Counter(), Counter()
    try:
        with beside.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0.0) as tar:
            for place, example in enumerate(examples):
                try:
                    if isinstance(example, BadSampleError):
                        raise example
                    image = decode_image(example.image)
                except BadSampleError as error:
                    skipped[error.reason] += 1
                    continue
                found = find_regions(image, example.captions, detect, options, asked)
                key = f"{path.stem.removeprefix('boxes-')}-{place:06d}"
                tar.write({"__key__": key, **_fields(example, image, found)})
                written, without, boxes = written + 1, without + (not found), boxes + len(found)
                phrases.update(phrase for f in found for phrase in set(f.phrases.values()))
        counts = Counts(written, without, boxes, asked, skipped, phrases)
        _write_json(path.with_suffix(".json"), counts.as_json())
        os.replace(beside, path)  # last: a shard that is there is whole, and so are its counts
    finally:
        beside.unlink(missing_ok=True)


def _fields(example: Example, image: "Image", found: list[Found]) -> dict[str, bytes]:
    """Members of the tar: the record, and the picture as it is encoded if tars have such."""
    record = {
        "key": example.key,
        "captions": dict(example.captions),
        "group": example.group,
        "subset": example.subset,
        "height": image.height,
        "width": image.width,
        "regions": [
            {
                "phrase": dict(phrases),
                "box": [round(side, 2) for side in box],
                "score": round(score, 4),
            }
            for phrases, score, box in found
        ],
    }
    Image = require("PIL.Image", "data")
    with Image.open(io.BytesIO(example.image)) as header:
        extension = _EXTENSIONS.get(header.format)
    picture = example.image
    if extension is None:
        out = io.BytesIO()
        image.save(out, "PNG")
        extension, picture = "png", out.getvalue()
    return {extension: picture, "json": json.dumps(record, ensure_ascii=False).encode()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
    os.replace(beside, path)


@contextmanager
def _progress(total: int | None) -> Iterator[Callable]:
    """A bar on the console; what is yielded moves it on, and hands on what it is given."""
    progress = require("rich.progress", "train")
    console = require("rich.console", "train").Console(stderr=True)
    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    with progress.Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("finding boxes", total=total)

        def advance(item: object, steps: int = 1) -> object:
            bar.advance(task, steps)
            return item

        yield advance
