"""How many patches are hidden, where, and what they count."""

import pytest
import torch

from siglip2.self_distillation import draw_masks

GRIDS = [(3, 5), (1, 1), (16, 16), (2, 1), (7, 9)]
LENGTHS = [h * w for h, w in GRIDS]


def draw(layout="random", share=0.5, grids=GRIDS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(grids, share, generator=generator, layout=layout)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("layout", ["random", "blocks"])
def test_exactly_the_share_of_each_image_rounded_down_is_hidden(layout, share):
    masks = draw(layout, share)
    hidden = [int(part.sum()) for part in masks.mask.split(LENGTHS)]
    assert hidden == [int(share * n) for n in LENGTHS]
    assert len(masks.index) == sum(hidden)
    assert torch.equal(masks.index.sort().values, masks.mask.nonzero()[:, 0])
    image = torch.repeat_interleave(torch.tensor(LENGTHS))
    assert (image[masks.index].diff() >= 0).all()


@pytest.mark.parametrize("layout", ["random", "blocks"])
def test_draws_repeat_with_the_generator_alone(layout):
    first, again, other = (draw(layout, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.mask, other.mask)


def test_random_patches_are_hidden_alike():
    masks = draw(grids=[(4, 4)] * 4000)
    often = masks.mask.view(4000, 16).float().mean(0)
    assert (often - 0.5).abs().max() < 0.04


def neighbours_alike(mask):  # (B, h, w): share of adjacent pairs that are both hidden or both not
    across = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()
    return (across + (mask[:, 1:] == mask[:, :-1]).float().mean()).item() / 2


def test_blocks_are_blocks():
    layouts, grids = ("blocks", "random"), [(16, 16)] * 200
    blocks, noise = (draw(layout, grids=grids).mask.view(-1, 16, 16) for layout in layouts)
    assert neighbours_alike(noise) == pytest.approx(0.5, abs=0.02)
    assert neighbours_alike(blocks) > 0.8
    often = blocks.float().mean(0)
    assert often.min() > 0  # corners, as with BEiT: fewer rectangles reach them
    assert often.max() < 1


def test_weights_sum_to_one_an_image():
    masks = draw()
    hidden = masks.mask.split(LENGTHS)
    sums = [
        part.sum().item() for part in masks.hidden_weights().split([int(x.sum()) for x in hidden])
    ]
    assert sums == pytest.approx([1.0 if int(n / 2) else 0.0 for n in LENGTHS])
    parts = masks.all_weights(0.25).split(LENGTHS)
    for part, mask, n in zip(parts, hidden, LENGTHS, strict=True):
        assert part[mask].sum().item() == pytest.approx(1.0 if n > 1 else 0.0)
        assert part[~mask].sum().item() == pytest.approx(0.25)


def test_wrong_input_is_one_clear_error():
    needed = "need a share from 0 to 1 and layout 'random' or 'blocks'; got "
    with pytest.raises(ValueError, match=f"{needed}1.5 and 'random'"):
        draw(share=1.5)
    with pytest.raises(ValueError, match=f"{needed}0.5 and 'block'"):
        draw("block")


def test_no_images_have_no_masks():
    masks = draw(grids=[])
    assert [len(x) for x in masks] == [0] * len(masks)
    assert len(draw("blocks", grids=[]).mask) == 0
