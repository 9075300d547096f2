"""Image batches of every dialect -> packed patches. The one place where padded layouts are known.

Host copies of sizes are made here, once a batch; nothing below this boundary waits for the device.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.types import PackedImages
from .presets import VisionConfig
from .sequences import Sequences, ragged

Images = Tensor | PackedImages | Mapping[str, Tensor]

TIMM_KEYS = ("patches", "patch_coord", "patch_valid")
HF_KEYS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class VisionInputs(NamedTuple):
    patches: Tensor  # (T, P*P*C) uint8, or float in [-1, 1]
    grid_hw: Tensor  # (B, 2) int32, on the host
    seqs: Sequences


def batch_size(image: Images) -> int:
    """How many images a batch of any dialect holds, without a look at the device.

    Raises ValueError for anything else.
    """
    if isinstance(image, PackedImages):
        return image.grid_hw.shape[0]
    if isinstance(image, Tensor):
        return image.shape[0]
    return image[_keys(image)[0]].shape[0]


def token_counts(image: Images, config: VisionConfig) -> list[int]:
    """Vision tokens of each image of a batch; a padded dialect's sizes are looked at."""
    if isinstance(image, Tensor):
        return [config.grid_size**2] * image.shape[0]
    if isinstance(image, PackedImages):
        return image.grid_hw.prod(1).tolist()
    keys = _keys(image)
    if keys == TIMM_KEYS:
        return image["patch_valid"].sum(1).tolist()
    return image["spatial_shapes"].prod(1).tolist()


def take_images(image: Images, first: int, last: int) -> Images:
    """Images [first, last) of a batch, in its dialect. Views, and no wait for the device.

    Raises ValueError for what is no dialect.
    """
    if isinstance(image, Tensor):
        return image[first:last]
    if not isinstance(image, PackedImages):
        return {key: image[key][first:last] for key in _keys(image)}
    lengths = [h * w for h, w in image.grid_hw.tolist()]
    start, mine = sum(lengths[:first]), lengths[first:last]
    return PackedImages(
        image.patches[start : start + sum(mine)],
        image.grid_hw[first:last],
        image.cu_seqlens[first : last + 1] - image.cu_seqlens[first],
        max(mine, default=0),
    )


def _keys(image: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The keys of the dialect a dictionary is in."""
    if isinstance(image, Mapping):
        for keys in (TIMM_KEYS, HF_KEYS):
            if all(key in image for key in keys):
                return keys
    got = sorted(image) if isinstance(image, Mapping) else type(image).__name__
    raise ValueError(
        "need an image tensor (B, 3, H, W), PackedImages, or a dictionary with"
        f" {TIMM_KEYS} or {HF_KEYS}; got {got}"
    )


def patchify(
    image: Tensor,  # (B, C, H, W)
    patch_size: int,
) -> Tensor:  # (B, h, w, P*P*C)
    """Cut whole patches, row-major; inside a patch (y, x, channel).

    A remainder of pixels is cropped.
    """
    B, C, H, W = image.shape
    P = patch_size
    h, w = H // P, W // P
    image = image[:, :, : h * P, : w * P]
    return image.reshape(B, C, h, P, w, P).permute(0, 2, 4, 3, 5, 1).reshape(B, h, w, P * P * C)


def vision_inputs(image: Images, config: VisionConfig, device: torch.device) -> VisionInputs:
    """Packed patches of a batch, on `device`; bytes stay bytes.

    Takes an image tensor (B, 3, H, W) in [-1, 1], `PackedImages`, timm's dictionary
    (`patches, patch_coord, patch_valid`) or transformers'
    (`pixel_values, pixel_attention_mask, spatial_shapes`).
    Raises ValueError for any other shape or key.
    """
    if isinstance(image, Tensor):
        patches, grids = _from_tensor(image, config)
    elif isinstance(image, PackedImages):
        patches, grids = image.patches, image.grid_hw.tolist()
    else:
        keys = _keys(image)
        from_padded = _from_timm if keys == TIMM_KEYS else _from_hf
        patches, grids = from_padded(*(image[key] for key in keys))
    lengths = [h * w for h, w in grids]
    _check(patches, grids, sum(lengths), config)
    grid_hw = torch.tensor(grids, dtype=torch.int32).view(-1, 2)
    patches = patches.to(device, non_blocking=True)
    return VisionInputs(patches, grid_hw, ragged(lengths, device))


Grids = list[list[int]]  # (h, w) of each image


def _from_tensor(image: Tensor, config: VisionConfig) -> tuple[Tensor, Grids]:
    side = config.image_size
    grid = config.grid_size
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"need images (B, 3, H, W); got {tuple(image.shape)}")
    if any(size // config.patch_size != grid for size in image.shape[2:]):
        raise ValueError(
            f"need images (B, 3, {side}, {side}); got {tuple(image.shape)}. Resize them with the"
            " model's own transform, or pass PackedImages to use other sizes"
        )
    if not image.is_floating_point():
        raise ValueError(f"need float images in [-1, 1]; got {image.dtype}. Use x / 127.5 - 1")
    patches = patchify(image, config.patch_size).flatten(0, 2)
    return patches, [[grid, grid]] * image.shape[0]


def _from_timm(
    patches: Tensor,  # (B, N, P*P*C)
    coord: Tensor,  # (B, N, 2) (y, x)
    valid: Tensor,  # (B, N) bool
) -> tuple[Tensor, Grids]:
    valid = valid.bool()
    # One past the largest coordinate; an image with nothing valid gets the grid (0, 0).
    masked = F.pad(coord.masked_fill(~valid[..., None], -1), (0, 0, 0, 1), value=-1)
    sizes = masked.amax(1) + 1
    order = coord[..., 0] * sizes[:, 1:] + coord[..., 1]
    expected = torch.arange(coord.shape[1], device=coord.device).expand_as(order)
    if not bool(((order == expected) | ~valid).all()):
        raise ValueError(
            "need every patch of each image, row by row, before its padding; got patch_coord in"
            " another order or with gaps"
        )
    return patches[valid], sizes.tolist()


def _from_hf(
    pixel_values: Tensor,  # (B, N, P*P*C)
    mask: Tensor,  # (B, N)
    spatial_shapes: Tensor,  # (B, 2)
) -> tuple[Tensor, Grids]:
    return pixel_values[mask.bool()], spatial_shapes.tolist()


def _check(patches: Tensor, grids: Grids, tokens: int, config: VisionConfig) -> None:
    width = 3 * config.patch_size**2
    if patches.ndim != 2 or patches.shape[1] != width:
        raise ValueError(
            f"need patches (T, {width}) for patch size {config.patch_size};"
            f" got {tuple(patches.shape)}"
        )
    if patches.shape[0] != tokens:
        raise ValueError(f"need {tokens} patches for grids {grids[:4]}...; got {patches.shape[0]}")
