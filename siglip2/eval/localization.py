"""How well boxes are found: intersection over union, and what one box for all would reach."""

from collections.abc import Iterator

import torch
from torch import Tensor


def box_iou(
    a: Tensor,  # (N, 4) x0, y0, x1, y1
    b: Tensor,  # (N, 4)
) -> Tensor:  # (N,)
    """Intersection over union of pairs of boxes; 0 for an empty or inverted one."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b)]
    return both / (areas[0] + areas[1] - both).clamp(min=torch.finfo(a.dtype).tiny)


def accuracy_at(
    predicted: list[tuple[float, float, float, float] | None],
    true: Tensor,  # (N, 4)
    threshold: float = 0.5,
) -> float:
    """Share of boxes found with at least this intersection over union; None is a miss.

    Raises ValueError for other numbers of boxes, or none.
    """
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"need a prediction for each box; got {len(predicted)} for {len(true)}")
    boxes = torch.tensor([box or (0.0,) * 4 for box in predicted], dtype=true.dtype)
    return float((box_iou(boxes, true) >= threshold).float().mean())


def best_constant_accuracy(true: Tensor, threshold: float = 0.5) -> float:
    """What the best single box for all images reaches, of the true ones and their median."""
    return max(float((found >= threshold).float().mean()) for found in _constant_ious(true))


def best_constant_iou(true: Tensor) -> float:
    """The largest mean that one box for all reaches, of the true ones and their median."""
    return max(float(found.mean()) for found in _constant_ious(true))


def _constant_ious(true: Tensor) -> Iterator[Tensor]:  # (N,) for each box tried
    median = true.median(0).values[None]
    for box in torch.cat((true, median)):
        yield box_iou(box.expand_as(true), true)
