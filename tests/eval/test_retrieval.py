"""Recall at k: against a loop, and where flattery could creep in."""

import math

import pytest
import torch

from siglip2.eval.retrieval import chance_recall, ranks, retrieval_recall


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return z / z.norm(dim=1, keepdim=True)


def looped_recall(query, item, query_groups, item_groups, k: int) -> float:
    """The definition, one pair at a time, in float64."""
    hits = 0
    for q, groups in zip(query.double(), query_groups, strict=True):
        scores = [float(q @ x) for x in item.double()]
        right = [bool(set(groups) & set(other)) for other in item_groups]
        best = max(s for s, r in zip(scores, right, strict=True) if r)
        hits += sum(s >= best for s, r in zip(scores, right, strict=True) if not r) < k
    return hits / len(query)


def problem(num_groups: int = 13, texts_a_group: int = 3) -> tuple:
    """Noisy clusters; some images share a group, and every fourth text belongs to two groups."""
    centre = unit(num_groups, 8, seed=0)
    img_groups = [(str(i % num_groups),) for i in range(2 * num_groups)]
    txt_groups = [
        (str(i % num_groups), str((i + 1) % num_groups)) if i % 4 == 0 else (str(i % num_groups),)
        for i in range(texts_a_group * num_groups)
    ]
    img = unit(len(img_groups), 8, seed=1) + centre[[int(g[0]) for g in img_groups]]
    txt = unit(len(txt_groups), 8, seed=2) + centre[[int(g[0]) for g in txt_groups]]
    norm = torch.nn.functional.normalize
    return norm(img, dim=1), norm(txt, dim=1), img_groups, txt_groups


@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_matches_a_loop_with_several_positives(chunk_size):
    img, txt, img_groups, txt_groups = problem()
    found = retrieval_recall(img, txt, img_groups, txt_groups, chunk_size=chunk_size)
    for k in (1, 5, 10):
        assert found.i2t[k] == looped_recall(img, txt, img_groups, txt_groups, k)
        assert found.t2i[k] == looped_recall(txt, img, txt_groups, img_groups, k)
    assert 0 < found.i2t[1] < found.i2t[10]
    assert (found.num_images, found.num_texts) == (26, 39)


def test_a_group_may_be_given_as_a_string():
    img, txt, img_groups, _ = problem(texts_a_group=2)
    plain = [g[0] for g in img_groups]
    assert retrieval_recall(img, txt, plain, plain) == retrieval_recall(
        img, txt, img_groups, img_groups
    )


@pytest.mark.parametrize("width", [64, 1152])
def test_a_collapsed_model_is_not_above_chance(width):
    """All embeddings equal, up to the rounding that tiles of a matrix product differ by."""
    same = unit(1, width, seed=3)
    rounding = 1 + 1e-7 * torch.randn(300, 1, generator=torch.Generator().manual_seed(4))
    groups = [str(i) for i in range(300)]
    found = retrieval_recall(same * rounding, same.expand(300, -1), groups, groups, chunk_size=77)
    assert found.i2t == found.t2i == {1: 0.0, 5: 0.0, 10: 0.0}
    assert found.chance_i2t[1] == pytest.approx(1 / 300)


def test_one_tie_costs_one_rank():
    img = torch.eye(3)
    txt = torch.eye(3)[[0, 0, 1, 2]]
    found = ranks(img, txt, ["a", "b", "c"], ["a", "x", "b", "c"])
    assert found.rank.tolist() == [1, 0, 0]
    assert found.num_positives.tolist() == [1, 1, 1]


def test_random_embeddings_are_near_chance():
    img, txt = unit(400, 32, seed=5), unit(400, 32, seed=6)
    groups = [str(i % 100) for i in range(400)]
    found = retrieval_recall(img, txt, groups, groups)
    for k in (1, 5, 10):
        chance = found.chance_i2t[k]
        deviation = math.sqrt(chance * (1 - chance) / 400)
        assert abs(found.i2t[k] - chance) < 5 * deviation


@pytest.mark.parametrize(
    ("positives", "items", "k", "expected"),
    [(1, 10, 1, 0.1), (1, 10, 5, 0.5), (2, 4, 2, 1 - 1 / 6), (1, 3, 5, 1.0), (9, 10, 2, 1.0)],
)
def test_chance_is_a_random_orders_recall(positives, items, k, expected):
    assert chance_recall(torch.tensor([positives]), items, k) == pytest.approx(expected)


@pytest.mark.parametrize("side", ["image", "text"])
def test_names_the_embedding_that_is_not_finite(side):
    img, txt, img_groups, txt_groups = problem()
    (img if side == "image" else txt)[3, 2] = math.nan
    with pytest.raises(ValueError, match=f"finite {side} embeddings; 1 of .* is number 3"):
        retrieval_recall(img, txt, img_groups, txt_groups)


def test_refuses_a_query_without_a_positive():
    img, txt = unit(2, 4, seed=0), unit(2, 4, seed=1)
    with pytest.raises(ValueError, match=r"number 1 \(group 'b'\) shares its group with none"):
        retrieval_recall(img, txt, ["a", "b"], ["a", "a"])


def test_refuses_shapes_and_lengths_that_disagree():
    img, txt = unit(2, 4, seed=0), unit(2, 5, seed=1)
    with pytest.raises(ValueError, match=r"need img \(N, D\), txt \(M, D\)"):
        retrieval_recall(img, txt, ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="2 images with 1, 2 texts with 2"):
        retrieval_recall(img, img, ["a"], ["a", "b"])


def test_leaves_the_matmul_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        retrieval_recall(*problem())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
