"""Encoded pictures to model input: fixed squares in [-1, 1], or NaFlex patches of any aspect ratio.

Pillow decodes; torch resizes uint8 pixels, bilinear with antialias, as transformers' torchvision
processors do and within 2 grey levels of its Pillow ones.
"""

import io
import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from siglip2.data.augment import Place, on_canvas
from siglip2.data.packing import pack_patches, pillow_pixels, resize_uint8
from siglip2.data.types import BadSampleError, PackedImages
from siglip2.errors import require

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 100_000_000
# Pillow warns of odd metadata and large pictures.  Not around each decoding: `catch_warnings` in
# several threads at once leaves the process with the filters of any one of them.
warnings.filterwarnings("ignore", module=r"PIL\.")

SizeOf = Callable[[int, int], tuple[int, int]]  # (height, width) -> (height, width)
_HAS_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


def _to_rgb(image: "Image") -> "Image":
    """RGB; what is transparent becomes white."""
    from PIL import Image

    if image.mode in _HAS_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> "Image":
    """RGB picture of an encoded one: alpha on white, EXIF orientation ignored, first frame.

    Raises BadSampleError: the file is cut short, is no picture, or its header promises more than
    `max_image_pixels` (checked before any pixel is decoded; Pillow's own limit holds as well).
    """
    return _decoded(data, max_image_pixels, None)[0]


def _decoded(
    data: bytes, max_image_pixels: int, draft_size: SizeOf | None
) -> tuple["Image", tuple[int, int]]:
    """The picture and the file's (height, width), which a draft is smaller than."""
    Image = require("PIL.Image", "data")
    too_many = f"more than {max_image_pixels} pixels"
    try:
        with Image.open(io.BytesIO(data)) as image:
            height, width = image.height, image.width
            if width * height > max_image_pixels:
                raise BadSampleError(too_many)
            if draft_size is not None:
                image.draft(None, draft_size(height, width)[::-1])  # of JPEG alone
            image.load()
            return _to_rgb(image), (height, width)
    except BadSampleError:
        raise
    except Image.DecompressionBombError:
        raise BadSampleError(too_many) from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        truncated = "truncated" in str(error)
        raise BadSampleError("truncated image" if truncated else "cannot decode image") from error


@lru_cache(maxsize=65536)
def naflex_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """Pixels (height, width), multiples of `patch_size`, with at most `max_num_patches` patches.

    big_vision's binary search for the largest ratio (image_text/ops_naflex.py): small images grow,
    the aspect ratio changes by less than one patch a side.
    """
    eps, patch = 1e-5, patch_size

    def scaled(ratio: float) -> tuple[int, int]:
        h, w = (max(patch, patch * math.ceil(side * ratio / patch)) for side in (height, width))
        return h, w

    low, high = eps / 10, 100.0
    while high - low >= eps:
        ratio = (low + high) / 2
        h, w = scaled(ratio)
        if (h // patch) * (w // patch) <= max_num_patches:
            low = ratio
        else:
            high = ratio
    return scaled(low)


def pack(images: Sequence[PackedImages]) -> PackedImages:
    """One packed batch of several."""
    lengths = torch.cat([image.cu_seqlens.diff() for image in images])
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return PackedImages(
        patches=torch.cat([image.patches for image in images]),
        grid_hw=torch.cat([image.grid_hw for image in images]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(image.max_seqlen for image in images),
    )


class Fitted(NamedTuple):
    """A picture at its size, and where it lies in it."""

    pixels: Tensor  # (H, W, 3) uint8
    place: Place


class Decoded(NamedTuple):
    """A picture before it is resized."""

    pixels: Tensor  # (H, W, 3 or 4) uint8, the fourth without meaning; a draft's are fewer
    height: int  # of the file
    width: int


def _pixels(image: "Image | bytes", max_image_pixels: int, draft_size: SizeOf | None) -> Decoded:
    """Raises BadSampleError."""
    if isinstance(image, bytes | bytearray | memoryview):
        rgb, size = _decoded(image, max_image_pixels, draft_size)
    elif 0 in image.size:
        raise BadSampleError("image without pixels")
    else:
        rgb, size = _to_rgb(image), (image.height, image.width)
    return Decoded(pillow_pixels(rgb), *size)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:  # (*size, 3) uint8
    if pixels.shape[:2] == size:
        return pixels[..., :3].clone()  # the picture may be the caller's
    return resize_uint8(pixels, size)[..., :3]


class FixedTransform:
    """Squares of `image_size`: the aspect ratio is squashed, as fixed-size SigLIP 2 models expect.

    Called on one picture it returns float (3, S, S) in [-1, 1]; `prepare` returns uint8, which is
    what loaders keep and send between processes. Both raise BadSampleError.

    Args:
        jpeg_draft: Decode a JPEG that is at least twice as large as needed at 1/2, 1/4 or 1/8 of
            its size: faster, and not pixel-equal to resizing it whole.
    """

    def __init__(
        self,
        image_size: int,
        *,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        jpeg_draft: bool = False,
    ):
        self.image_size = image_size
        self.max_image_pixels, self.jpeg_draft = max_image_pixels, jpeg_draft

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (height, width) a picture of this height and width is resized to."""
        return self.image_size, self.image_size

    def prepare(self, image: "Image | bytes") -> Tensor:  # (3, S, S) uint8
        draft_size = self.size if self.jpeg_draft else None
        pixels, *size = _pixels(image, self.max_image_pixels, draft_size)
        return _resized(pixels, self.size(*size)).permute(2, 0, 1).contiguous()

    def stack(self, prepared: Sequence[Tensor]) -> Tensor:  # (B, 3, S, S) uint8
        return torch.stack(list(prepared))

    def finish(self, batch: Tensor) -> Tensor:  # uint8 -> float in [-1, 1]
        return batch.to(torch.float32).div_(127.5).sub_(1.0)

    def collate(self, images: Sequence[Tensor]) -> Tensor:  # (B, 3, S, S) float
        batch = self.stack(images)
        return batch if batch.is_floating_point() else self.finish(batch)

    def __call__(self, image: "Image | bytes") -> Tensor:  # (3, S, S) float
        return self.finish(self.prepare(image))


class NaflexTransform:
    """Pictures at their own aspect ratio, as close below `max_num_patches` as whole patches allow.

    Called on one picture it returns uint8 patches: the model folds x / 127.5 - 1 into its patch
    embedding. `prepare` returns the resized picture, which `stack` packs with all of its batch.
    `decode` and `fit` are its two halves, for pictures that are resized anew each time.

    Args:
        canvas_aspect: Above 1 pictures are put on white canvases of aspect ratios up to this and
            its inverse (`siglip2.data.augment.on_canvas`).
        jpeg_draft: As for `FixedTransform`.
    """

    def __init__(
        self,
        patch_size: int,
        max_num_patches: int,
        *,
        canvas_aspect: float = 1.0,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        jpeg_draft: bool = False,
    ):
        self.patch_size = patch_size
        self.max_num_patches = max_num_patches
        self.canvas_aspect = canvas_aspect
        self.max_image_pixels, self.jpeg_draft = max_image_pixels, jpeg_draft

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (height, width) a picture of this height and width is resized to."""
        return naflex_size(height, width, self.patch_size, self.max_num_patches)

    def at(self, max_num_patches: int) -> "NaflexTransform":
        """The same with another budget."""
        return NaflexTransform(
            self.patch_size,
            max_num_patches,
            canvas_aspect=self.canvas_aspect,
            max_image_pixels=self.max_image_pixels,
            jpeg_draft=self.jpeg_draft,
        )

    def decode(self, image: "Image | bytes") -> Decoded:
        """Raises BadSampleError."""
        return _pixels(image, self.max_image_pixels, self.size if self.jpeg_draft else None)

    def fit(
        self,
        decoded: Decoded,
        max_num_patches: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Fitted:
        """The picture at a budget; without `rng` its canvas depends on its pixels alone."""
        pixels, height, width = decoded
        place = Place()
        if self.canvas_aspect > 1:
            if rng is None:
                rng = np.random.default_rng(zlib.crc32(pixels.numpy()))
            pixels, place = on_canvas(pixels[..., :3], self.canvas_aspect, rng)
            height, width = pixels.shape[:2]
        budget = max_num_patches or self.max_num_patches
        size = naflex_size(height, width, self.patch_size, budget)
        return Fitted(_resized(pixels, size), place)

    def prepare(self, image: "Image | bytes") -> Tensor:  # (H, W, 3) uint8
        return self.fit(self.decode(image)).pixels

    def stack(self, prepared: Sequence[Tensor]) -> PackedImages:
        return pack_patches(prepared, self.patch_size)

    def finish(self, batch: PackedImages) -> PackedImages:
        return batch

    def collate(self, images: Sequence[Tensor] | Sequence[PackedImages]) -> PackedImages:
        if isinstance(images[0], PackedImages):
            return pack(images)
        return self.stack(images)

    def __call__(self, image: "Image | bytes") -> PackedImages:  # of one image
        return self.stack([self.prepare(image)])


Transform = FixedTransform | NaflexTransform
