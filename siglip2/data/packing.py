"""Decoded pictures to packed patches: pixels, resize, and one call that cuts and packs a batch.

The packing runs in C++ (csrc/host) where it is built, else in numpy, with the same output.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.data.types import PackedImages
from siglip2.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    from siglip2 import _host
except ImportError:
    _host = None

# Below this share a thread costs more to start than it copies in the meantime.
_THREAD_BYTES = 1 << 20


def has_host() -> bool:
    """Whether the C++ extension packs."""
    return _host is not None


def packing_backend() -> str:
    """What packs images, and why, for reports of the environment."""
    if has_host():
        return "C++ (siglip2._host)"
    return "numpy (siglip2._host is not built: install siglip2 where there is a C++17 compiler)"


def resize_uint8(
    image: Tensor,  # (H, W, 3) uint8; a fourth channel is resized like the others
    size: tuple[int, int],  # (height, width)
) -> Tensor:  # (height, width, 3) uint8
    """Antialiased bilinear resize, within 2 grey levels of Pillow's; releases the GIL.

    Raises DataError if the image is empty or no (H, W, 3) uint8, or `size` is not positive.
    """
    fault = _fault(image, channels=(3, 4))
    if fault or min(size) < 1:
        raise DataError(
            f"need an image (H, W, 3) uint8 and a size of positive sides; got {fault or size}"
        )
    if tuple(image.shape[:2]) == tuple(size):
        return image
    # As a batch whose strides say channels-last beyond doubt: torch then answers in channels-last
    # too, three times faster than into planes.
    batch = image.contiguous()[None].permute(0, 3, 1, 2)
    resized = F.interpolate(batch, size=tuple(size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


class _Copied:
    """A picture's pixels for numpy, writable: `tobytes` makes a copy that nobody else has.

    From read-only memory torch warns; a second copy takes as long as the resize.
    """

    def __init__(self, image: "Image"):
        self._owner = np.frombuffer(image.tobytes(), np.uint8)
        self.__array_interface__ = {
            "version": 3,
            "shape": (image.height, image.width, 3),
            "typestr": "|u1",
            "data": (self._owner.ctypes.data, False),
        }


def _arrow_view(image: "Image") -> np.ndarray | None:  # (H, W, 4)
    """None from Pillow before 11.3, and where rows are padded or lie in several blocks (16 MB)."""
    from PIL import Image

    if not hasattr(image, "__arrow_c_array__") or 4 * image.width % Image.core.get_alignment():
        return None
    try:
        _, array = image.__arrow_c_array__()
        return _host.arrow_pixels(array, image.height, image.width)
    except ValueError:
        return None


def pillow_pixels(image: "Image") -> Tensor:  # (H, W, 4) or (H, W, 3) uint8
    """An RGB picture's pixels, not to be written to: where it can be, they are Pillow's own."""
    view = _host and _arrow_view(image)
    if view is None:
        view = np.asarray(_Copied(image))
    return torch.from_numpy(view)


def _fault(image: object, channels: tuple[int, ...] = (3,)) -> str | None:
    """Why this is no image on the host, in words, or None."""
    if not isinstance(image, Tensor | np.ndarray):
        return type(image).__name__
    if isinstance(image, Tensor) and image.device.type != "cpu":
        return f"a tensor on {image.device}"
    if image.dtype != (torch.uint8 if isinstance(image, Tensor) else np.uint8):
        return str(image.dtype)
    if image.ndim != 3 or image.shape[2] not in channels or 0 in image.shape:
        return str(tuple(image.shape))
    return None


def _as_arrays(images: Sequence[Tensor | np.ndarray], patch_size: int) -> list[np.ndarray]:
    P = patch_size
    if P < 1:
        raise DataError(f"need patch_size >= 1; got {P}")
    arrays = []
    for i, image in enumerate(images):
        fault = _fault(image)
        if not fault and (image.shape[0] % P or image.shape[1] % P):
            fault = str(tuple(image.shape))
        if fault:
            raise DataError(
                f"need uint8 images (H, W, 3) with sides that are multiples of {P}; "
                f"image {i} is {fault}"
            )
        arrays.append(image.numpy() if isinstance(image, Tensor) else image)
    return arrays


def pack_patches(
    images: Sequence[Tensor | np.ndarray],  # (H, W, 3) uint8, any strides
    patch_size: int,
    *,
    threads: int | None = None,
    out: Tensor | None = None,  # (>= T, P*P*3) uint8, contiguous
) -> PackedImages:
    """One packed batch of images whose sides are multiples of `patch_size`.

    Args:
        threads: None takes torch's, fewer for small batches. The output does not depend on it.
        out: Written from its first row; the result's patches are a view of it (pinned memory, say).

    Raises DataError, naming the image's place, if one is empty, no (H, W, 3) uint8 on the host or
    not a multiple; or if `out` is too small or of another width, dtype or layout.
    """
    arrays = _as_arrays(images, patch_size)
    width = 3 * patch_size**2
    T = sum(array.shape[0] * array.shape[1] for array in arrays) // patch_size**2
    if out is None:
        patches = torch.empty(T, width, dtype=torch.uint8)
    else:
        patches = _first_rows(out, T, width)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), patches.numel() // _THREAD_BYTES))
    elif threads < 1:
        raise DataError(f"need threads >= 1; got {threads}")
    if _host is not None:
        pair = _host.pack_patches(arrays, patch_size, threads, patches.numpy())
        grid_hw, cu_seqlens = map(torch.from_numpy, pair)
    else:
        grid_hw, cu_seqlens = _pack_numpy(arrays, patch_size, patches.numpy())
    max_seqlen = int(grid_hw.prod(1).max()) if len(arrays) else 0
    return PackedImages(patches, grid_hw, cu_seqlens, max_seqlen)


def _first_rows(out: Tensor, T: int, width: int) -> Tensor:
    fits = out.dtype == torch.uint8 and out.device.type == "cpu" and out.is_contiguous()
    if not fits or out.ndim != 2 or out.shape[0] < T or out.shape[1] != width:
        raise DataError(
            f"need out ({T} or more, {width}) uint8, contiguous, on the host; got "
            f"{tuple(out.shape)} {out.dtype} with strides {out.stride()} on {out.device}"
        )
    return out[:T]


def _pack_numpy(
    arrays: list[np.ndarray], patch_size: int, patches: np.ndarray
) -> tuple[Tensor, Tensor]:  # grid_hw, cu_seqlens
    P = patch_size
    grids = [(array.shape[0] // P, array.shape[1] // P) for array in arrays]
    ends = np.cumsum([0] + [h * w for h, w in grids], dtype=np.int32)
    for i, (array, (h, w)) in enumerate(zip(arrays, grids, strict=True)):
        cut = array.reshape(h, P, w, P, 3).transpose(0, 2, 1, 3, 4)
        patches[ends[i] : ends[i + 1]].reshape(h, w, P, P, 3)[...] = cut
    return torch.tensor(grids, dtype=torch.int32).view(-1, 2), torch.from_numpy(ends)


def patch_coords(
    grid_hw: Tensor,  # (B, 2) int32
) -> Tensor:  # (T, 2) int32
    """(y, x) of every packed patch within its own image."""
    grids = grid_hw.numpy()
    lengths = grids.prod(1)
    firsts = np.cumsum(lengths) - lengths
    number = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
    rows, columns = np.divmod(number, np.repeat(grids[:, 1], lengths))
    return torch.from_numpy(np.stack([rows, columns], 1).astype(np.int32))
