"""Encoded pictures to model input: fixed squares in [-1, 1], or NaFlex patches of any aspect ratio.

Resizing is Pillow's BILINEAR on uint8, which antialiases when it shrinks, as transformers does.
"""

import io
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from siglip2.data.types import BadSampleError, PackedImages
from siglip2.errors import require

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 100_000_000
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
    return image.convert("RGB")


def decode_image(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> "Image":
    """RGB picture of an encoded one: alpha on white, EXIF orientation ignored, first frame.

    Raises BadSampleError: the file is cut short, is no picture, or its header promises more than
    `max_image_pixels` (checked before any pixel is decoded; Pillow's own limit holds as well).
    """
    Image = require("PIL.Image", "data")
    too_many = f"more than {max_image_pixels} pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_image_pixels:
                    raise BadSampleError(too_many)
                return _to_rgb(image)
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


def patchify(pixels: Tensor, patch_size: int) -> Tensor:  # (H, W, C) -> (T, P*P*C)
    """Patches in row-major order; inside a patch (y, x, channel)."""
    H, W, C = pixels.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"need sides divisible by patch_size {P}; got {(H, W)}")
    return pixels.view(H // P, P, W // P, P, C).transpose(1, 2).reshape(-1, P * P * C)


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


def _resized(image: "Image", height: int, width: int) -> Tensor:  # (H, W, 3) uint8
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image))


class FixedTransform:
    """Squares of `image_size`: the aspect ratio is squashed, as fixed-size SigLIP 2 models expect.

    Called on one picture it returns float (3, S, S) in [-1, 1]; `prepare` returns uint8, which is
    what loaders keep and send between processes. Both raise BadSampleError.
    """

    def __init__(self, image_size: int, *, max_image_pixels: int = MAX_IMAGE_PIXELS):
        self.image_size = image_size
        self.max_image_pixels = max_image_pixels

    def prepare(self, image: "Image | bytes") -> Tensor:  # (3, S, S) uint8
        rgb = _rgb_of(image, self.max_image_pixels)
        return _resized(rgb, self.image_size, self.image_size).permute(2, 0, 1).contiguous()

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

    Returns uint8 patches: the model folds x / 127.5 - 1 into its patch embedding.
    """

    def __init__(
        self,
        patch_size: int,
        max_num_patches: int,
        *,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        self.patch_size = patch_size
        self.max_num_patches = max_num_patches
        self.max_image_pixels = max_image_pixels

    def prepare(self, image: "Image | bytes") -> PackedImages:  # of one image
        rgb = _rgb_of(image, self.max_image_pixels)
        H, W = naflex_size(rgb.height, rgb.width, self.patch_size, self.max_num_patches)
        patches = patchify(_resized(rgb, H, W), self.patch_size)
        T = len(patches)
        return PackedImages(
            patches=patches,
            grid_hw=torch.tensor([[H // self.patch_size, W // self.patch_size]], dtype=torch.int32),
            cu_seqlens=torch.tensor([0, T], dtype=torch.int32),
            max_seqlen=T,
        )

    def stack(self, prepared: Sequence[PackedImages]) -> PackedImages:
        return pack(prepared)

    def finish(self, batch: PackedImages) -> PackedImages:
        return batch

    collate = stack
    __call__ = prepare


def _rgb_of(image: "Image | bytes", max_image_pixels: int) -> "Image":
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(image, max_image_pixels=max_image_pixels)
    return _to_rgb(image)


Transform = FixedTransform | NaflexTransform
