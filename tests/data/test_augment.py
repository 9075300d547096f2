"""Random shifts: every image is itself, moved; the generator decides how far."""

import numpy as np
import pytest
import torch

from siglip2.data.augment import WHITE, Place, random_shift
from siglip2.data.images import NaflexTransform
from siglip2.data.loader import TrainLoader
from siglip2.data.regions import Region
from siglip2.data.tars import StreamedTars
from siglip2.errors import DataError

REGIONS = {"left": (0.5, 0.0, 1.0, 0.5), "gone": (0.0, 0.9, 0.1, 1.0)}


def make_images(num=16, height=20, width=10):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 255, (num, 3, height, width), dtype=np.uint8)
    )


def shifts_that_explain(image, moved, most_y, most_x):
    """The (dy, dx) for which `moved` is `image` moved by them, with white where nothing was."""
    found = []
    H, W = image.shape[1:]
    for dy in range(-most_y, most_y + 1):
        for dx in range(-most_x, most_x + 1):
            expected = torch.full_like(image, WHITE)
            for y in range(max(dy, 0), min(H, H + dy)):
                for x in range(max(dx, 0), min(W, W + dx)):
                    expected[:, y, x] = image[:, y - dy, x - dx]
            if torch.equal(expected, moved):
                found.append((dy, dx))
    return found


def test_each_image_is_moved_by_at_most_the_share_of_its_sides():
    image = make_images()
    moved, places = random_shift(image, 0.1, np.random.default_rng(1))
    found = [shifts_that_explain(a, b, 2, 1) for a, b in zip(image, moved, strict=True)]
    assert all(len(shifts) == 1 for shifts in found)
    assert len({shifts[0] for shifts in found}) > 5  # not one shift for all
    H, W = image.shape[2:]
    told = [(round(place.down * H), round(place.right * W)) for place in places]
    assert told == [shifts[0] for shifts in found]


def test_regions_move_with_the_picture():
    left, gone = (Region({"en": name}, box) for name, box in REGIONS.items())
    shifted = Place(down=0.25, right=-0.25).move((left, gone))
    assert shifted == (left._replace(box=(0.25, 0.25, 0.75, 0.75)),)
    assert Place().move((left, gone)) == (left, gone)
    # In the lower right quarter of a canvas twice as high and wide.
    on_canvas, _ = Place(1.0, 1.0, 2.0, 2.0).move((left, gone))
    assert on_canvas.box == (0.75, 0.5, 1.0, 0.75)


def test_the_generator_decides():
    image = make_images()
    first, second, other = (
        random_shift(image, 0.2, np.random.default_rng(seed))[0] for seed in (7, 7, 8)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("share", [-0.1, 0.5])
def test_rejects_a_share_outside_its_range(share):
    with pytest.raises(DataError, match=r"random_shift must be in \[0, 0.5\)"):
        TrainLoader(
            StreamedTars("x.tar", ["x.tar"]), None, None, batch_size=2, seed=0, random_shift=share
        )


def test_rejects_naflex():
    source = StreamedTars("x.tar", ["x.tar"])
    with pytest.raises(DataError, match=r"0 for NaFlex models; got 0\.1"):
        TrainLoader(source, NaflexTransform(8, 16), None, batch_size=2, seed=0, random_shift=0.1)
