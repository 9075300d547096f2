"""Boxes with words: what a part of an image is called."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

from siglip2.errors import DataError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of the image's sides


class Region(NamedTuple):
    phrases: Mapping[str, str]  # language tag -> what it is called; "und" when not said
    box: Box


def box_from_pixels(
    box: Sequence[float],  # x0, y0, x1, y1 in pixels, the last two behind the box
    *,
    height: int,
    width: int,
    where: str,
) -> Box:
    """Shares of the sides.

    Raises DataError, naming `where`, if it is not four finite numbers, inverted, empty or outside.
    """
    numbers = box if isinstance(box, Sequence) and not isinstance(box, str) else ()
    if len(numbers) != 4 or not all(_is_finite(c) for c in numbers):
        raise DataError(f"{where}: need a box of four finite numbers; got {box}")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(
            f"{where}: need x0 < x1 within 0 to {width} and y0 < y1 within 0 to {height};"
            f" got {list(box)}"
        )
    return x0 / width, y0 / height, x1 / width, y1 / height


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def cropped(region: Region, crop: Box, *, min_kept: float = 0.5) -> Region | None:
    """The region as a crop of the image shows it; None where less than `min_kept` of it is left."""
    x0, y0, x1, y1 = region.box
    left, top, right, bottom = crop
    kept = (max(x0, left), max(y0, top), min(x1, right), min(y1, bottom))
    area = max(kept[2] - kept[0], 0) * max(kept[3] - kept[1], 0)
    if area <= 0 or area < (min_kept - 1e-9) * (x1 - x0) * (y1 - y0):  # but for rounding
        return None
    width, height = right - left, bottom - top
    box = tuple(
        (side - low) / size
        for side, low, size in zip(
            kept, (left, top, left, top), (width, height, width, height), strict=True
        )
    )
    return region._replace(box=box)
