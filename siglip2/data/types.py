"""What travels between a data source, the collator and the model."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from siglip2.data.regions import Region
from siglip2.errors import DataError


class BadSampleError(DataError):
    """One example cannot be used. Loaders skip it and count it under `reason`."""

    def __init__(self, reason: str, key: str = ""):
        super().__init__(f"{reason}: {key}" if key else reason)
        self.reason = reason
        self.key = key

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.key)


class Example(NamedTuple):
    """One image and its captions, as a source yields it: still encoded, not yet tokenised."""

    key: str  # unique within the source; named in reports
    image: bytes  # an encoded picture (PNG, JPEG, WebP, ...)
    captions: Mapping[str, str]  # language tag -> caption; "und" when the source does not say
    group: str  # examples of one group show the same thing and are positives of one another
    subset: str = ""  # a part that evaluation reports by itself (quick start: the drawing style)
    regions: tuple[Region, ...] = ()  # parts of the image, with names


class PackedImages(NamedTuple):
    """Images of any size as one sequence of patches; no padding."""

    patches: Tensor  # (T, P*P*C), uint8 or float in [-1, 1]; inside a patch (y, x, channel)
    grid_hw: Tensor  # (B, 2) int32, CPU: patches down, across
    cu_seqlens: Tensor  # (B+1,) int32: image i is rows [cu[i], cu[i+1])
    max_seqlen: int  # longest image, in patches
