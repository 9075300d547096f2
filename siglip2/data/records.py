"""Records of data sets to examples: the picture, its captions, and regions in pixels."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siglip2.data.captions import UNKNOWN_LANGUAGE, base_language, parse_captions
from siglip2.data.regions import Box, Region, box_from_pixels
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError, require

BAD_BOX = "bad box"


def read_image(path: Path, key: str) -> bytes:
    """Raises BadSampleError."""
    try:
        return path.read_bytes()
    except OSError:
        raise BadSampleError("missing image file", key) from None


def picture_size(image: bytes, key: str) -> tuple[int, int]:
    """(height, width) from an encoded picture's header. Raises BadSampleError."""
    Image = require("PIL.Image", "data")
    try:
        with Image.open(io.BytesIO(image)) as picture:
            return picture.height, picture.width
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise BadSampleError("cannot decode image", key) from error


def region_box(
    box: Sequence[float],  # x0, y0, x1, y1 in pixels, the last two behind the box
    size: tuple[int, int],  # height, width
    *,
    where: str,
    slack_px: float = 0.0,
) -> Box:
    """As `box_from_pixels`, with a BadSampleError for a bad box.

    What reaches over an edge by at most `slack_px` is cut off there.
    """
    height, width = size
    try:
        if slack_px:
            box = [
                min(max(c, 0), side) if -slack_px <= c <= side + slack_px else c
                for c, side in zip(box, (width, height, width, height), strict=True)
            ]
        return box_from_pixels(box, height=height, width=width, where=where)
    except DataError as error:
        raise BadSampleError(BAD_BOX, str(error)) from None
    except (TypeError, ValueError):  # no numbers, or not four: said in the terms of the box
        message = f"{where}: need a box of four finite numbers; got {box!r}"
        raise BadSampleError(BAD_BOX, message) from None


def record_regions(
    record: Mapping[str, Any], captions: Mapping[str, str], image: bytes, key: str
) -> tuple[Region, ...]:
    """Of the record's "regions": [{"phrase": text or {language: text}, "box": [x0, y0, x1, y1]}].

    Boxes are in pixels of the picture, whose size is the record's "height" and "width" or else
    stands in its header. A phrase that is a plain text is in the language of the captions, if they
    have one. Raises BadSampleError, which names the region by its index.
    """
    found = record.get("regions")
    if isinstance(found, str) and found:  # a column of a table
        try:
            found = json.loads(found)
        except ValueError:
            raise BadSampleError("malformed regions", key) from None
    if found in (None, "", [], ()):
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(x, Mapping) for x in found):
        message = f"{key}: need a list of {{'phrase', 'box'}}; got {str(found)[:80]}"
        raise BadSampleError("malformed regions", message)
    size = _record_size(record) or picture_size(image, key)
    language = _language(captions)
    regions = []
    for index, region in enumerate(found):
        where = f"{key}, region {index}"
        phrases = parse_captions(region.get("phrase"), language)
        if not phrases:
            raise BadSampleError("region without a phrase", where)
        regions.append(Region(phrases, region_box(region.get("box"), size, where=where)))
    return tuple(regions)


def _record_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    try:
        height, width = int(record["height"]), int(record["width"])
    except (KeyError, TypeError, ValueError):
        return None
    return (height, width) if height > 0 and width > 0 else None


def _language(captions: Mapping[str, str]) -> str:
    languages = {base_language(tag) for tag in captions}
    return languages.pop() if len(languages) == 1 else UNKNOWN_LANGUAGE


def make_example(
    key: str, image: bytes, captions: Mapping[str, str], record: Mapping[str, Any] | None = None
) -> Example:
    """The example; `record` may name its group, subset and regions.

    Raises BadSampleError without a caption, and where a region is bad.
    """
    if not captions:
        raise BadSampleError("no caption", key)
    record = record or {}
    group, subset = record.get("group"), record.get("subset")
    return Example(
        key=key,
        image=image,
        captions=captions,
        group=str(group) if group not in (None, "") else key,
        subset=str(subset) if subset is not None else "",
        regions=record_regions(record, captions, image, key),
    )
