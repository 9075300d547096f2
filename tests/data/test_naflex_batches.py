"""NaFlex batches under budgets and on canvases: what each image gets, and that runs resume."""

from itertools import islice

import numpy as np
import pytest
import torch
from data.made_examples import Numbers, assert_same, loader, streamed
from data.made_files import picture

from siglip2.data.augment import WHITE, on_canvas
from siglip2.data.budgets import Budgets
from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.errors import DataError

SIZES = (2, 6, 12)


def budgets(mode="mixed", *, rank_count=1, **options):
    return Budgets(SIZES, mode=mode, batch_size=4, world_size=rank_count, seed=3, **options)


def naflex(source, mode="mixed", *, rank=0, world_size=1, transform=None, **options):
    drawn = budgets(mode, rank_count=world_size, **options.pop("budget_options", {}))
    transform = transform or NaflexTransform(2, 12)
    return loader(source, transform, budgets=drawn, rank=rank, world_size=world_size, **options)


@pytest.mark.parametrize("mode", ["batch", "mixed"])
@pytest.mark.parametrize("cache_images", [False, True], ids=["", "cached"])
def test_each_image_is_resized_to_its_own_budget(mode, cache_images):
    found = naflex(Numbers(10), mode, cache_images=cache_images)
    for number, batch in enumerate(islice(found, 12)):
        sizes = budgets(mode).of_rank(number, 0)
        grids = batch["image"].grid_hw
        # 8 x 8 pixels: a square of whole patches below each budget.
        assert grids.prod(1).tolist() == [{2: 1, 6: 4, 12: 9}[int(n)] for n in sizes]


def test_pixels_are_those_of_a_transform_at_that_budget():
    source = Numbers(10)
    batch = next(naflex(source))
    expected = loader(source, NaflexTransform(2, 12))  # the same order
    plain = next(expected)
    assert torch.equal(batch["image_ids"], plain["image_ids"])
    cu = batch["image"].cu_seqlens
    by_id = {i: n for n, i in enumerate(batch["image_ids"].tolist())}
    assert len(by_id) == 4
    from siglip2.data.batches import stable_id

    for number in range(10):
        at = by_id.get(stable_id(str(number)))
        if at is None:
            continue
        size = int(budgets().of_rank(0, 0)[at])
        alone = NaflexTransform(2, size)(picture(number)).patches
        assert torch.equal(batch["image"].patches[cu[at] : cu[at + 1]], alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_have_budgets_too(shards, workers):
    found = naflex(streamed(shards, samples=None), workers=workers)
    for number, batch in enumerate(islice(found, 6)):
        sizes = budgets().of_rank(number, 0)
        lengths = batch["image"].cu_seqlens.diff().tolist()
        assert lengths == [{2: 1, 6: 4, 12: 9}[int(n)] for n in sizes]


def test_a_run_resumes_with_the_same_budgets_and_canvases():
    make = lambda: naflex(Numbers(10), transform=NaflexTransform(2, 12, canvas_aspect=3.0))
    whole = make()
    expected = list(islice(whole, 7))
    first = make()
    list(islice(first, 3))
    second = make()
    second.load_state_dict(first.state_dict())
    for batch, other in zip(second, expected[3:], strict=False):
        assert_same(batch, other)


def test_ranks_draw_other_canvases_and_equal_counts():
    batches = [next(naflex(Numbers(30), rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batch["image_ids"]) for batch in batches] == [4, 4]
    drawn = budgets(rank_count=2)
    for rank, batch in enumerate(batches):
        lengths = batch["image"].cu_seqlens.diff().tolist()
        assert lengths == [{2: 1, 6: 4, 12: 9}[int(n)] for n in drawn.of_rank(0, rank)]


def test_what_a_batch_holds_is_reported():
    found = naflex(Numbers(10))
    assert found.packing() == {}
    batch = next(found)
    tokens = batch["image"].patches.shape[0]
    report = found.packing()
    assert report["data/tokens"] == tokens
    assert report["data/fill"] == tokens / budgets().of_rank(0, 0).sum()
    assert report["data/balance"] == 1.0
    fixed = loader(Numbers(10))
    next(fixed)
    assert fixed.packing() == {}


def test_large_batches_ask_for_parts():
    found = naflex(Numbers(10), "batch", budget_options={"max_tokens": 16})
    for number, batch in enumerate(islice(found, 8)):
        expected = budgets("batch", max_tokens=16).parts(number)
        assert (
            batch.get("accum_steps", 1)
            == expected
            == -(-4 * budgets("batch").of_rank(number, 0)[0] // 16)
        )


def test_fixed_models_have_no_budgets():
    with pytest.raises(DataError, match="patch_budgets are for NaFlex models"):
        loader(Numbers(4), FixedTransform(8), budgets=budgets())


def test_a_canvas_holds_the_picture_unscaled_on_white():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8))
    ratios = []
    for seed in range(200):
        canvas, place = on_canvas(pixels, 3.0, np.random.default_rng(seed))
        H, W, _ = canvas.shape
        ratios.append(W / H)
        spots = [
            (y, x)
            for y in range(H - 7)
            for x in range(W - 5)
            if torch.equal(canvas[y : y + 8, x : x + 6], pixels)
        ]
        assert spots
        y, x = spots[0]
        assert (y, x) == (place.down * 8, pytest.approx(place.right * 6))
        assert (place.height * 8, pytest.approx(place.width * 6)) == (H, W)
        canvas[y : y + 8, x : x + 6] = WHITE
        assert bool((canvas == WHITE).all())
        assert H == 8 or W == 6
    assert min(ratios) < 0.4 < 2.5 < max(ratios)


def test_evaluation_draws_a_canvas_by_the_picture_alone():
    transform = NaflexTransform(2, 12, canvas_aspect=3.0)
    first, again = (transform(picture(5)) for _ in range(2))
    assert torch.equal(first.patches, again.patches)
    grids = {tuple(transform(picture(i)).grid_hw[0].tolist()) for i in range(20)}
    assert len(grids) > 3
    wider = transform.at(40)
    assert wider.canvas_aspect == 3.0
    assert 12 < len(wider(picture(5)).patches) <= 40
