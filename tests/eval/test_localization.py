import pytest
import torch

from siglip2.eval.localization import accuracy_at, best_constant_accuracy, box_iou


def test_intersection_over_union():
    a = torch.tensor([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.float64)
    b = torch.tensor([[1, 1, 3, 3], [0, 0, 1, 1], [2, 2, 3, 3], [0, 0, 1, 1]], dtype=torch.float64)
    assert box_iou(a, b).tolist() == pytest.approx([1 / 7, 1, 0, 0])


def test_a_missing_box_is_a_miss():
    true = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 4)
    found = [(0.0, 0.0, 1.0, 1.0), None, (0.0, 0.0, 1.0, 0.5), (0.0, 0.0, 1.0, 0.4)]
    assert accuracy_at(found, true) == 0.5
    with pytest.raises(ValueError, match="got 3 for 4"):
        accuracy_at(found[:3], true)
    with pytest.raises(ValueError, match="got 0 for 0"):
        accuracy_at([], true[:0])


def test_the_best_constant_box_is_the_commonest():
    left, right = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
    assert best_constant_accuracy(torch.tensor([left, left, right])) == pytest.approx(2 / 3)
