"""Crops, colours and masks against definitions written out here, an image at a time."""

import colorsys
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import packed, random_images, tiny_architecture

from siglip2.models.inputs import patchify
from siglip2.self_distillation import ViewConfig, draw_views
from siglip2.self_distillation.crops import Canvas, canvas, draw_boxes, resized_crops
from siglip2.self_distillation.photometric import gaussian, grey, photometric, shifted_hue
from siglip2.self_distillation.views import global_side, local_side

EPS = torch.finfo(torch.float64).eps
VISION = tiny_architecture(patch_size=4, grid=4).vision
PLAIN = ViewConfig(num_local=3, flip=0.0).crops_alone()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SIZES = torch.tensor([[40.0, 56.0], [24.0, 16.0], [40.0, 3.0], [7.0, 56.0]])


def test_crops_equal_torchs_antialiased_resize_of_the_box():
    pixels = torch.rand(4, 3, 40, 56, generator=generator(), dtype=torch.float64)
    boxes = draw_boxes(SIZES, 20, (0.05, 1.0), (3 / 4, 4 / 3), generator())
    flip = torch.rand(4, 20, generator=generator()) < 0.5
    found = resized_crops(Canvas(pixels, SIZES), boxes, 16, flip).view(4, 20, 3, 16, 16)
    compared = 0
    for image in range(4):
        for view in range(20):
            y, x = boxes.corner[image, view].long().tolist()
            h, w = boxes.sides[image, view].long().tolist()
            if w == 1:
                continue  # torch's own kernel errs there
            box = pixels[image : image + 1, :, y : y + h, x : x + w]
            wanted = F.interpolate(box, (16, 16), mode="bilinear", antialias=True)[0]
            wanted = wanted.flip(-1) if flip[image, view] else wanted
            assert (found[image, view] - wanted).abs().max() <= 64 * EPS
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("area", [(0.05, 0.4), (0.4, 1.0)], ids=str)
def test_boxes_have_the_areas_and_aspects_asked_for(area):
    sides = torch.tensor([[256.0, 256.0], [200.0, 320.0]])
    boxes = draw_boxes(sides, 4000, area, (3 / 4, 4 / 3), generator())
    assert (boxes.corner >= 0).all()
    assert (boxes.corner + boxes.sides <= sides[:, None]).all()
    assert torch.equal(boxes.sides, boxes.sides.round())
    share = boxes.sides.prod(-1) / sides.prod(1)[:, None]
    aspect = boxes.sides[..., 1] / boxes.sides[..., 0]
    rounding = 1.03
    assert share.min() > area[0] / rounding
    assert share.max() < area[1] * rounding
    assert aspect.min() > 3 / 4 / rounding
    assert aspect.max() < 4 / 3 * rounding
    if area[1] < 1:  # nothing is refused, so the shares are uniform
        assert share.mean().item() == pytest.approx(sum(area) / 2, abs=0.01)
        assert aspect.log().mean().item() == pytest.approx(0, abs=0.01)
    places = boxes.corner / (sides[:, None] - boxes.sides).clamp(min=1)
    assert places.mean().item() == pytest.approx(0.5, abs=0.02)


def test_an_image_that_no_box_fits_is_cropped_in_the_middle():
    boxes = draw_boxes(torch.tensor([[100.0, 10.0], [10.0, 100.0]]), 2, (0.9, 1.0), (3 / 4, 4 / 3),
                       generator())  # fmt: skip
    assert boxes.sides[:, 0].tolist() == [[13, 10], [10, 13]]
    assert boxes.corner[:, 1].tolist() == [[43, 0], [0, 43]]


def test_packed_patches_become_the_pictures_they_were():
    grids = [(2, 3), (4, 1), (1, 1)]
    images = random_images(grids, 4)
    found = canvas(packed(images, grids), VISION, torch.device("cpu"))
    assert found.pixels.shape == (3, 3, 16, 12)
    assert found.size.tolist() == [[8, 12], [16, 4], [4, 4]]
    for pixels, patches, (h, w) in zip(found.pixels, images, grids, strict=True):
        inside = pixels[None, :, : 4 * h, : 4 * w]
        assert torch.equal(patchify(2 * inside - 1, 4).flatten(0, 2), 2 * (patches + 1) / 2 - 1)


def test_bytes_and_floats_give_the_same_views():
    pixels = torch.randint(256, (2, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    floats = pixels.float() / 127.5 - 1
    views = [draw_views(x, ViewConfig(num_local=2), VISION, generator()) for x in (pixels, floats)]
    for ours, theirs in zip(*views, strict=True):
        torch.testing.assert_close(ours.patches, theirs.patches)


def test_views_are_packed_squares_whatever_the_images_are():
    grids = [(2, 3), (4, 1)]
    views = draw_views(packed(random_images(grids, 4), grids), PLAIN, VISION, generator())
    assert views.global_view.grid_hw.tolist() == [[4, 4]] * 2
    assert views.local_views.grid_hw.tolist() == [[2, 2]] * 6
    assert views.local_views.seqs.cu_seqlens.tolist() == list(range(0, 25, 4))
    assert views.local_views.patches.shape == (24, 48)
    assert draw_views(torch.zeros(2, 3, 16, 16), PLAIN, VISION, generator(), local=False)[1] is None


def test_local_views_of_an_image_follow_one_another():
    colours = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 16, 16)
    views = draw_views(colours, PLAIN, VISION, generator())
    means = views.local_views.patches.view(3, 3, -1)
    torch.testing.assert_close(means, torch.tensor([-1.0, 0, 1])[:, None, None].expand_as(means))


def test_crops_alone_keep_the_colours_of_the_image():
    """What photometric changes do to a flat canvas is all that a patch of it shows."""
    flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(8, 3, 16, 16)
    patch = patchify(flat[:1], 4)[0, 0, 0]
    deviation = {}
    for name, config in {"all": ViewConfig(), "none": ViewConfig().crops_alone()}.items():
        views = draw_views(flat, config, VISION, generator())
        both = (views.global_view.patches, views.local_views.patches)
        deviation[name] = [(x - patch).abs().max().item() for x in both]
    assert max(deviation["none"]) <= 1e-6
    assert min(deviation["all"]) > 0.1


def test_views_repeat_with_the_generator_and_differ_from_one_another():
    image = torch.rand(2, 3, 16, 16, generator=generator()) * 2 - 1
    draws = [draw_views(image, ViewConfig(), VISION, generator(seed)) for seed in (0, 0, 1)]
    first, again, other = (x.local_views.patches for x in draws)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(view.tolist()) for view in first.view(16, -1)[:, :20]}) == 16
    assert first.abs().max() <= 1 + 1e-6


def test_sides_of_views():
    b16 = tiny_architecture(patch_size=16, grid=16).vision
    assert (global_side(ViewConfig(), b16), local_side(ViewConfig(), b16)) == (256, 96)
    l14 = tiny_architecture(patch_size=14, grid=16).vision
    assert (global_side(ViewConfig(), l14), local_side(ViewConfig(), l14)) == (224, 84)
    assert local_side(ViewConfig(local_px=98), l14) == 98
    with pytest.raises(ValueError, match="need local_px of whole patches of 16 pixels; got 98"):
        local_side(ViewConfig(local_px=98), b16)


def test_hue_is_turned_as_in_hsv():
    x = torch.rand(5, 3, 4, 4, generator=generator(), dtype=torch.float64)
    x[0] = x[0, :1]  # grey has no hue
    turns = torch.rand(5, 1, 1, 1, generator=generator(), dtype=torch.float64) - 0.5
    found = shifted_hue(x, turns)
    for n, y, column in [(n, y, c) for n in range(5) for y in range(4) for c in range(4)]:
        h, s, v = colorsys.rgb_to_hsv(*x[n, :, y, column].tolist())
        wanted = colorsys.hsv_to_rgb((h + turns[n].item()) % 1, s, v)
        torch.testing.assert_close(found[n, :, y, column], torch.tensor(wanted).double())


def test_blur_is_a_gaussian_without_what_lies_outside():
    matrix = gaussian(torch.tensor([0.1, 1.5], dtype=torch.float64)[:, None, None], 9)
    torch.testing.assert_close(matrix[0], torch.eye(9, dtype=torch.float64))
    taps = [math.exp(-((i - 2) ** 2) / (2 * 1.5**2)) for i in range(9)]
    wanted = torch.tensor(taps).double() / sum(taps)
    torch.testing.assert_close(matrix[1, 2], wanted)


ONLY = {
    "grayscale": lambda x: grey(x).expand_as(x),
    "solarize": lambda x: torch.where(x < 128 / 255, x, 1 - x),
}


@pytest.mark.parametrize("name", ONLY)
def test_each_image_is_changed_with_the_probability_asked_for(name):
    x = torch.rand(2000, 3, 2, 2, generator=generator())
    config = replace(PLAIN, grayscale=0.3 if name == "grayscale" else 0.0)
    solarize = 0.3 if name == "solarize" else 0.0
    found = photometric(x, config, blur=0.0, solarize=solarize, generator=generator(1))
    same = (found == x).flatten(1).all(1)
    changed = (found == ONLY[name](x)).flatten(1).all(1)
    assert (same | changed).all()
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_jitter_follows_its_definition():
    """With three of four factors at 1 what is left is the fourth alone."""
    x = torch.rand(400, 3, 3, 3, generator=generator(), dtype=torch.float64)
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    means = {
        "brightness": lambda x: torch.zeros_like(x),
        "contrast": lambda x: grey(x).mean((1, 2, 3), keepdim=True).expand_as(x),
        "saturation": lambda x: grey(x).expand_as(x),
    }
    for name, mean in means.items():
        config = replace(PLAIN, jitter=1.0, **{**none, name: 0.5})
        y = photometric(x, config, blur=0.0, solarize=0.0, generator=generator())
        m = mean(x)
        inside = (y > 0) & (y < 1) & ((x - m).abs() > 1e-3)
        factor = torch.where(inside, (y - m) / torch.where(inside, x - m, 1), torch.nan)
        of_image = factor.flatten(1).nanmedian(1).values
        torch.testing.assert_close(
            factor, of_image[:, None, None, None].where(inside, torch.nan), equal_nan=True
        )
        seen = of_image[of_image.isfinite()]
        assert 0.5 <= seen.min() < 0.55
        assert 1.4 < seen.max() <= 1.5
