"""A batch that the teacher has seen, in parts that the student sees one after another."""

from ..models.inputs import VisionInputs
from ..models.sequences import uniform
from .losses import Targets
from .masks import Masks
from .stage import Prepared
from .views import Views


def take_prepared(prepared: Prepared, first: int, last: int) -> Prepared:
    """Images [first, last): the losses of all parts add up to those of the batch.

    Views are squares, so that every image has as many patches. Views of tensors; nothing waits.
    """
    B = len(prepared.views.global_view.grid_hw)
    share = first, last, B
    local = prepared.views.local_views
    views = Views(
        _images(prepared.views.global_view, *share),
        None if local is None else _images(local, *share),
    )
    return prepared._replace(
        views=views,
        masks=_masks(prepared.masks, *share),
        image_targets=_targets(prepared.image_targets, *share),
        patch_targets=_targets(prepared.patch_targets, *share),
    )


def _rows(total: int, first: int, last: int, num_images: int) -> slice:
    """Of `total` rows, as many for each image."""
    each = total // num_images
    return slice(first * each, last * each)


def _images(view: VisionInputs, first: int, last: int, num_images: int) -> VisionInputs:
    length = len(view.patches) // len(view.grid_hw)
    rows = _rows(len(view.patches), first, last, num_images)
    grid_hw = view.grid_hw[_rows(len(view.grid_hw), first, last, num_images)]
    return VisionInputs(
        view.patches[rows], grid_hw, uniform(len(grid_hw), length, view.patches.device)
    )


def _masks(masks: Masks | None, first: int, last: int, num_images: int) -> Masks | None:
    if masks is None:
        return None
    rows = _rows(len(masks.mask), first, last, num_images)
    index = masks.index[_rows(len(masks.index), first, last, num_images)] - rows.start
    return Masks(
        masks.mask[rows],
        index,
        masks.hidden_share[rows],
        masks.visible_share[rows],
        masks.num_hidden[first:last],
    )


def _targets(targets: Targets | None, first: int, last: int, num_images: int) -> Targets | None:
    if targets is None:
        return None
    return targets._replace(z=targets.z[_rows(len(targets.z), first, last, num_images)])
