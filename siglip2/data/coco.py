"""COCO-style JSON: boxes of categories, captions, or both, and the images they are of."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from siglip2.data.captions import UNKNOWN_LANGUAGE, parse_captions
from siglip2.data.records import picture_size, read_image, region_box
from siglip2.data.regions import Region
from siglip2.data.sources import IndexedSource
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError

_log = logging.getLogger("siglip2")
_SLACK_PX = 1.0  # boxes drawn by hand and rounded reach over the edge by this much
_SEEN = 20  # images to look for when the folder is not said


class _Boxed(NamedTuple):
    box: Any  # as written: x, y, width, height in pixels
    phrase: str | None  # None: the category is not listed
    language: str
    category: Any


class _Image(NamedTuple):
    name: str
    size: tuple[int, int] | None  # height, width
    captions: dict[str, list[str]]  # language -> captions
    boxed: list[_Boxed]


class Coco(IndexedSource):
    """Images with captions and regions of one or several COCO-style files, joined by image id.

    An annotation with a `bbox` is a region, called by its own `caption` or its category's name; one
    with a `caption` alone is a caption of the image, in its `language` if it has one. Where no file
    has captions, an image is captioned with the names of what its boxes show: "dog, tree".

    Crowds (`iscrowd`) are no regions. Annotations of images that are not listed are left out, with
    a note. Annotation ids are not read, so repeated ones do no harm.

    Args:
        folder: Of the images; None looks beside the files.

    Raises DataError: a file is not COCO-style, an image id comes twice or names two files, or the
    images are not where they are looked for.
    """

    def __init__(self, files: Sequence[Path], folder: Path | None = None):
        super().__init__(f"coco:{','.join(map(str, files))}" + (f":{folder}" if folder else ""))
        self._images: dict[Any, _Image] = {}
        hints: list[str] = []
        for file in files:
            content = _read(file)
            hints += _add_images(self._images, content, file)
            _add_annotations(self._images, content, file)
        self._ids = list(self._images)
        if not self._ids:
            raise DataError(f"{self.name} lists no images")
        names = [image.name for image in self._images.values()]
        self.folder = folder or _find_folder(files, names, hints)
        if not self.folder.is_dir():
            raise DataError(f"need the folder of the images; {str(self.folder)!r} is none")
        self.is_captioned = any(image.captions for image in self._images.values())

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        image_id = self._ids[index]
        name, size, texts, boxed = self._images[image_id]
        key = f"{name}#{image_id}"
        captions = parse_captions(texts)
        if self.is_captioned and not captions:
            raise BadSampleError("no caption", key)
        picture = read_image(self.folder / name, key)
        regions = _regions(boxed, size or picture_size(picture, key), key) if boxed else ()
        if not captions:
            captions = _names_in_order(regions)
        if not captions:
            raise BadSampleError("no caption", key)
        return Example(key, picture, captions, group=name, regions=regions)


def open_coco(spec: str) -> Coco:
    """FILE.json[,FILE.json...][:IMAGES_FOLDER]"""
    found = re.fullmatch(r"(.+?\.json)(?::(.+))?", spec)
    named = re.split(r"(?<=\.json),", found[1]) if found else ()
    files = [Path(file).expanduser() for file in named]
    if not found or not all(file.is_file() for file in files):
        missing = next((str(file) for file in files if not file.is_file()), spec)
        raise DataError(
            "need 'coco:ANNOTATIONS.json[,CAPTIONS.json][:IMAGES_FOLDER]';"
            f" {missing!r} is no file (of 'coco:{spec}')"
        )
    return Coco(files, Path(found[2]).expanduser() if found[2] else None)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from None
    if isinstance(content, dict):
        content = {"annotations": [], "categories": [], **content}
        lists = ("images", "annotations", "categories")
        if all(
            isinstance(content.get(part), list) and all(isinstance(x, dict) for x in content[part])
            for part in lists
        ):
            return content
    raise DataError(
        f"{file} is no COCO-style file: need lists of objects 'images', 'annotations' and"
        f" 'categories'; it has {', '.join(content) if isinstance(content, dict) else 'a list'}"
    )


def _add_images(images: dict[Any, _Image], content: Mapping[str, Any], file: Path) -> list[str]:
    """Adds what is not there yet; names of folders that the images' URLs speak of."""
    here = set()
    hints: dict[str, None] = {}
    for entry in content["images"]:
        url = entry.get("coco_url") or ""  # LVIS gives no file_name
        name = entry.get("file_name") or url.rpartition("/")[2]
        image_id = entry.get("id")
        if not name or not isinstance(image_id, int | str):
            raise DataError(f"{file}: need 'id' and 'file_name' of every image; got {entry}")
        if image_id in here:
            raise DataError(f"{file}: image id {image_id} comes twice; ids must be unique")
        here.add(image_id)
        known = images.get(image_id)
        if known is not None and known.name != name:
            raise DataError(
                f"{file}: image {image_id} is {name!r} here and {known.name!r} in the file before:"
                " these are not of one data set"
            )
        if known is None or known.size is None:
            size = _size(entry)
            images[image_id] = known._replace(size=size) if known else _Image(name, size, {}, [])
        if url.count("/") > 1:
            hints[url.split("/")[-2]] = None
    return list(hints)


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    both = all(isinstance(side, int | float) and side >= 1 for side in (height, width))
    return (int(height), int(width)) if both else None


def _add_annotations(images: dict[Any, _Image], content: Mapping[str, Any], file: Path) -> None:
    categories = {
        category.get("id"): str(category.get("name") or "").replace("_", " ").strip()
        for category in content["categories"]
    }
    strays = 0
    for entry in content["annotations"]:
        image = images.get(entry.get("image_id"))
        text = entry.get("caption")
        language = str(entry.get("language") or UNKNOWN_LANGUAGE)
        if image is None:
            strays += 1
        elif entry.get("bbox") is not None:
            if not entry.get("iscrowd"):
                category = entry.get("category_id")
                phrase = text if isinstance(text, str) else categories.get(category)
                image.boxed.append(_Boxed(entry["bbox"], phrase, language, category))
        elif isinstance(text, str) and text.strip():
            image.captions.setdefault(language, []).append(text)
    if strays:
        _log.warning("%s: %d annotations of images that are not listed, left out", file, strays)


def _regions(boxed: Iterable[_Boxed], size: tuple[int, int], key: str) -> tuple[Region, ...]:
    regions = []
    for index, (box, phrase, language, category) in enumerate(boxed):
        where = f"{key}, region {index}"
        if phrase is None:
            raise BadSampleError("unknown category", f"{where}: category_id {category!r}")
        if not phrase.strip():
            raise BadSampleError("region without a phrase", where)
        shares = region_box(_corners(box), size, where=where, slack_px=_SLACK_PX)
        regions.append(Region({language: phrase.strip()}, shares))
    return tuple(regions)


def _corners(box: Any) -> Any:
    """x0, y0, x1, y1 of x, y, width, height; what is no four numbers stays as it is."""
    try:
        x, y, width, height = box
        return [x, y, x + width, y + height]
    except (TypeError, ValueError):
        return box


def _names_in_order(regions: Sequence[Region]) -> dict[str, str]:
    """A caption of what is there, each name once, from left to right."""
    from_left = sorted(regions, key=lambda region: region.box)
    names = dict.fromkeys(name for region in from_left for name in region.phrases.values())
    return parse_captions(", ".join(names))


def _find_folder(files: Sequence[Path], names: Sequence[str], hints: Sequence[str]) -> Path:
    """The folder beside the files that most of the first images are in.

    annotations/instances_val2017.json has them in val2017/ or images/val2017/.
    """
    found: dict[Path, int] = defaultdict(int)
    for file in files:
        parts = dict.fromkeys(["", file.stem.rpartition("_")[2], *hints])
        for base in (file.parent, file.parent.parent):
            for folder in (base / middle / part for part in parts for middle in ("", "images")):
                if folder not in found:
                    found[folder] = sum((folder / name).is_file() for name in names[:_SEEN])
    best = max(found, key=found.__getitem__)
    if not found[best]:
        raise DataError(
            f"found no image such as {names[0]!r} beside {files[0]} (its folder, the one above, and"
            f" in them {', '.join(sorted({f.name for f in found}))}): name the folder, as in"
            f" 'coco:{files[0]}:IMAGES_FOLDER'"
        )
    return best
