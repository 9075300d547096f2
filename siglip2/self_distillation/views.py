"""Views of a batch for the losses: one global and several local crops an image.

The image itself goes to the sigmoid and the captioning loss as it is (SigLIP 2, section 2.3).
Views are squares whatever the images are: of NaFlex batches they become packed patches of grids of
their own, which no image of the batch needs to share.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.inputs import Images, VisionInputs, patchify
from ..models.presets import VisionConfig
from ..models.sequences import uniform
from .config import ViewConfig
from .crops import Canvas, canvas, draw_boxes, resized_crops
from .photometric import photometric


class Views(NamedTuple):
    """Local views of an image follow one another."""

    global_view: VisionInputs  # B images
    local_views: VisionInputs | None  # B * num_local images; None when there are none


def global_side(config: ViewConfig, vision: VisionConfig) -> int:
    """In pixels, whole patches."""
    return _side("global_px", config.global_px or vision.grid_size * vision.patch_size, vision)


def local_side(config: ViewConfig, vision: VisionConfig) -> int:
    """In pixels, whole patches: 96 of 256, and as near to 3/8 of other sides as patches allow."""
    P = vision.patch_size
    return _side(
        "local_px", config.local_px or P * max(1, int(3 / 8 * vision.grid_size + 0.5)), vision
    )


def _side(name: str, side: int, vision: VisionConfig) -> int:
    if side % vision.patch_size:
        raise ValueError(f"need {name} of whole patches of {vision.patch_size} pixels; got {side}")
    return side


def draw_views(
    images: Images,
    config: ViewConfig,
    vision: VisionConfig,
    generator: torch.Generator,
    *,
    local: bool = True,
) -> Views:
    """Crops, flips and photometric changes of a batch, on the generator's device.

    Args:
        images: Any dialect of `siglip2.models.inputs`, or uint8 (B, 3, H, W).
        local: Without, only the global view is made.
    """
    pictures = canvas(images, vision, generator.device)
    whole = _crops(pictures, 1, global_side(config, vision), config.global_area, config, generator)
    changes = {"blur": config.global_blur, "solarize": config.solarize}
    whole = photometric(whole, config, **changes, generator=generator)
    global_view = _packed(whole, vision)
    if not local or config.num_local == 0:
        return Views(global_view, None)
    side = local_side(config, vision)
    parts = _crops(pictures, config.num_local, side, config.local_area, config, generator)
    changes = {"blur": config.local_blur, "solarize": 0.0}
    parts = photometric(parts, config, **changes, generator=generator)
    return Views(global_view, _packed(parts, vision))


def _crops(
    pictures: Canvas,
    num: int,
    side: int,
    area: tuple[float, float],
    config: ViewConfig,
    generator: torch.Generator,
) -> Tensor:  # (B * num, 3, side, side)
    boxes = draw_boxes(pictures.size, num, area, config.aspect, generator)
    draw = torch.rand(boxes.sides.shape[:2], generator=generator, device=generator.device)
    return resized_crops(pictures, boxes, side, draw < config.flip)


def _packed(crops: Tensor, vision: VisionConfig) -> VisionInputs:  # (N, 3, S, S) in [0, 1]
    patches = patchify(2 * crops - 1, vision.patch_size)
    N, h, w, _ = patches.shape
    grid_hw = torch.tensor([[h, w]] * N, dtype=torch.int32).view(-1, 2)
    return VisionInputs(patches.flatten(0, 2), grid_hw, uniform(N, h * w, crops.device))
