import gc
import io

import numpy as np
import pytest
from PIL import Image

from siglip2.data import packing
from siglip2.data.packing import has_host, pillow_pixels

needs_arrow = pytest.mark.skipif(
    not has_host() or not hasattr(Image.Image, "__arrow_c_array__"),
    reason="needs _host and Pillow 11.3",
)


@pytest.fixture(params=[pytest.param("c++", marks=needs_arrow), "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(packing, "_host", None)


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def opened(height, width):
    """A picture whose pixels are not decoded yet."""
    out = io.BytesIO()
    noise(height, width).save(out, "PNG")
    return Image.open(out)


PICTURES = {
    "odd-sides": lambda: noise(7, 13),
    "one-pixel": lambda: noise(1, 1),
    "several-blocks": lambda: noise(2300, 2000),  # Pillow allocates at most 16 MB at once
    "cropped": lambda: noise(40, 50).crop((3, 5, 31, 26)),
    "not-decoded": lambda: opened(20, 30),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pixels_are_those_of_the_picture(make, backend):
    image = make()
    pixels = pillow_pixels(image)[..., :3]
    assert np.array_equal(pixels.numpy(), np.array(image))


@needs_arrow
def test_pixels_of_one_block_are_not_copied():
    image = noise(20, 30)
    before = pillow_pixels(image)
    image.paste((1, 2, 3), (0, 0, 30, 20))
    assert before[..., :3].unique().tolist() == [1, 2, 3]


def test_pixels_outlive_their_picture(backend):
    expected = np.array(noise(300, 400))
    pixels = pillow_pixels(noise(300, 400))
    gc.collect()
    reused = [noise(300, 400, seed) for seed in range(1, 4)]  # the memory, had it been given back
    assert np.array_equal(pixels[..., :3].numpy(), expected), len(reused)


@needs_arrow
@pytest.mark.parametrize("mode", ["L", "F"])
def test_pictures_of_other_layouts_are_refused(mode):
    image = Image.new(mode, (6, 4))
    _, array = image.__arrow_c_array__()
    with pytest.raises(ValueError, match="one list of four bytes for each of height x width"):
        packing._host.arrow_pixels(array, 4, 6)


@needs_arrow
def test_capsules_of_other_kinds_and_sizes_are_refused():
    schema, array = noise(4, 6).__arrow_c_array__()
    with pytest.raises(ValueError, match="need a capsule called arrow_array"):
        packing._host.arrow_pixels(schema, 4, 6)
    with pytest.raises(ValueError, match="one list of four bytes for each of height x width"):
        packing._host.arrow_pixels(array, 5, 6)
