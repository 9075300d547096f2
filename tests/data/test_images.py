import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2.data.images import (
    FixedTransform,
    NaflexTransform,
    decode_image,
    naflex_size,
    pack,
)
from siglip2.data.packing import pack_patches, resize_uint8
from siglip2.data.types import BadSampleError

LENGTHS = (128, 256, 576, 784, 1024)
# (height, width) -> sizes at LENGTHS with 16-pixel patches, as big_vision computes them.
GOLDEN_SIZES = {
    (480, 640): [(144, 192), (224, 288), (336, 432), (384, 512), (432, 576)],
    (224, 224): [(176, 176), (256, 256), (384, 384), (448, 448), (512, 512)],
    (256, 256): [(176, 176), (256, 256), (384, 384), (448, 448), (512, 512)],
    (1080, 1920): [(128, 240), (192, 336), (288, 512), (336, 592), (384, 672)],
    (333, 500): [(144, 224), (208, 304), (304, 464), (368, 544), (416, 624)],
    (100, 3000): [(32, 960), (48, 1360), (64, 1920), (80, 2400), (96, 2720)],
}
# (height, width, patch, length) -> size, from big_vision's own unit test.
GOLDEN_UNITS = {
    (48, 48, 3, 121): (33, 33),
    (112, 109, 7, 225): (105, 105),
    (256, 64, 8, 15): (56, 16),
    (63, 241, 16, 16): (32, 128),
    (16, 512, 16, 16): (16, 256),
}


def noise(height, width, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


def png_header(width, height):
    """A PNG whose header promises a picture, with no pixels behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        for body in (header, b"IDAT")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", GOLDEN_SIZES, ids=str)
def test_naflex_size_matches_big_vision(size):
    assert [naflex_size(*size, 16, n) for n in LENGTHS] == GOLDEN_SIZES[size]


@pytest.mark.parametrize("case", GOLDEN_UNITS, ids=str)
def test_naflex_size_matches_big_visions_unit_test(case):
    assert naflex_size(*case) == GOLDEN_UNITS[case]


def resized(image, size):
    return resize_uint8(torch.from_numpy(np.array(image)), size)


def test_naflex_patches_are_those_of_the_resized_picture():
    image = noise(60, 100)
    out = NaflexTransform(16, 40)(encoded(image))
    H, W = naflex_size(60, 100, 16, 40)
    assert out.patches.dtype == torch.uint8
    assert torch.equal(out.patches, pack_patches([resized(image, (H, W))], 16).patches)
    assert out.grid_hw.tolist() == [[H // 16, W // 16]]
    assert out.cu_seqlens.tolist() == [0, H * W // 256]


def test_naflex_stacks_prepared_pictures_as_it_collates_finished_ones():
    transform = NaflexTransform(8, 12)
    images = [noise(h, w, seed=h) for h, w in ((20, 30), (64, 8), (10, 10))]
    stacked = transform.stack([transform.prepare(image) for image in images])
    collated = transform.collate([transform(image) for image in images])
    for ours, theirs in zip(stacked[:3], collated[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert stacked.max_seqlen == collated.max_seqlen == max(stacked.cu_seqlens.diff().tolist())


def test_pack_joins_images_and_lists_of_images():
    transform = NaflexTransform(8, 12)
    images = [transform(noise(h, w, seed=h)) for h, w in ((20, 30), (64, 8), (10, 10))]
    whole = pack(images)
    assert torch.equal(whole.patches, torch.cat([image.patches for image in images]))
    assert whole.cu_seqlens.diff().tolist() == [len(image.patches) for image in images]
    assert whole.max_seqlen == max(len(image.patches) for image in images)
    again = pack([pack(images[:2]), images[2]])
    assert torch.equal(again.cu_seqlens, whole.cu_seqlens)
    assert torch.equal(again.grid_hw, whole.grid_hw)


def test_fixed_squashes_and_maps_to_minus_one_to_one():
    image = noise(50, 90)
    out = FixedTransform(32)(encoded(image))
    pixels = resized(image, (32, 32)).permute(2, 0, 1)
    torch.testing.assert_close(out, pixels.float() / 127.5 - 1)
    ends = np.zeros((32, 32, 3), np.uint8)
    ends[0] = 255
    assert FixedTransform(32)(Image.fromarray(ends)).unique().tolist() == [-1.0, 1.0]


def test_fixed_collate_takes_prepared_and_finished_images_alike():
    transform = FixedTransform(8)
    images = [noise(8, 8, seed=i) for i in range(3)]
    finished = transform.collate([transform(image) for image in images])
    assert torch.equal(transform.collate([transform.prepare(i) for i in images]), finished)


def test_alpha_is_composed_on_white():
    pixels = np.zeros((2, 3, 4), np.uint8)  # transparent black
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (0, 0, 0, 128)
    out = np.array(decode_image(encoded(Image.fromarray(pixels, "RGBA"))))
    assert out[0, 0].tolist() == [255, 0, 0]
    assert out[0, 1].tolist() == [127, 127, 127]
    assert (out[1] == 255).all()


def test_palette_transparency_is_composed_on_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    out = decode_image(encoded(image, transparency=0))
    assert out.getpixel((0, 0)) == (40, 50, 60)
    assert out.getpixel((1, 1)) == (255, 255, 255)


def test_grey_cmyk_and_16_bit_pictures_become_rgb():
    grey = noise(4, 5, "L")
    assert np.array_equal(np.array(decode_image(encoded(grey))), np.array(grey.convert("RGB")))
    assert decode_image(encoded(noise(4, 5, "CMYK"), "TIFF")).mode == "RGB"
    deep = np.array([[0, 256], [32768, 65535]], np.uint16)
    out = np.array(decode_image(encoded(Image.fromarray(deep))))
    assert out[..., 0].tolist() == [[0, 1], [128, 255]]


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode_image(encoded(noise(10, 20), "JPEG", exif=exif)).size == (20, 10)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(encoded(noise(64, 64), "JPEG")[:-900], "truncated image", id="cut-jpeg"),
        pytest.param(encoded(noise(64, 64))[:2000], "truncated image", id="cut-png"),
        pytest.param(b"", "cannot decode image", id="empty"),
        pytest.param(b"<html>404</html>", "cannot decode image", id="html"),
        pytest.param(png_header(8, 8), "truncated image", id="header-only"),
        pytest.param(png_header(200_000, 200_000), "more than 100000000 pixels", id="bomb"),
        pytest.param(png_header(12_000, 12_000), "more than 100000000 pixels", id="large"),
    ],
)
def test_bad_pictures_say_why(data, reason):
    with pytest.raises(BadSampleError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


def test_pillows_warnings_are_silent_and_the_callers_filters_stay():
    code = """
import io, warnings
from PIL import Image
from siglip2.data.images import decode_image
before, out = list(warnings.filters), io.BytesIO()
Image.new("P", (10, 10)).save(out, "PNG", transparency=bytes(range(256)))
Image.MAX_IMAGE_PIXELS = 64
print(decode_image(out.getvalue()).size, warnings.filters == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(10, 10) True\n", "")


def test_the_pixel_limit_is_a_parameter():
    data = encoded(noise(10, 10))
    assert FixedTransform(4, max_image_pixels=100)(data).shape == (3, 4, 4)
    with pytest.raises(BadSampleError, match="more than 99 pixels"):
        NaflexTransform(4, 4, max_image_pixels=99)(data)


def photo(height, width, mode="RGB"):
    """Low frequencies only, as a photo mostly holds: decoding at a fraction loses little."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 60 + c) * np.cos(y / 45 - c) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


TRANSFORMS = {
    "fixed": lambda **options: FixedTransform(64, **options),
    "naflex": lambda **options: NaflexTransform(16, 24, **options),
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_jpeg_draft_gives_nearly_the_same_picture_of_the_same_size(make, mode):
    data = encoded(photo(480, 640, mode), "JPEG", quality=95)
    whole, draft = make().prepare(data), make(jpeg_draft=True).prepare(data)
    assert draft.shape == whole.shape
    difference = (draft.int() - whole.int()).abs()
    assert difference.max() > 0, "the draft was not used"
    assert difference.float().mean() < 3


@pytest.mark.parametrize(
    ("data", "size"),
    [
        pytest.param(encoded(noise(100, 100), "JPEG"), 51, id="less-than-twice-as-large"),
        pytest.param(encoded(noise(100, 300)), 16, id="png"),
    ],
)
def test_a_draft_leaves_other_pictures_alone(data, size):
    whole = FixedTransform(size).prepare(data)
    assert torch.equal(FixedTransform(size, jpeg_draft=True).prepare(data), whole)


@pytest.mark.parametrize(("height", "width"), [(1, 100_000), (100_000, 1), (1, 1)], ids=str)
def test_extreme_pictures_work(height, width):
    data = encoded(photo(height, width))
    packed = NaflexTransform(16, 256)(data)
    assert 0 < packed.max_seqlen <= 256
    assert FixedTransform(32)(data).shape == (3, 32, 32)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_picture_without_pixels_is_a_bad_sample(make):
    with pytest.raises(BadSampleError, match="image without pixels"):
        make()(Image.new("RGB", (0, 5)))


def test_a_picture_given_by_the_caller_is_not_written_to():
    image = photo(32, 32)
    before = image.tobytes()
    FixedTransform(32).prepare(image).zero_()
    NaflexTransform(16, 4).prepare(image).zero_()
    assert image.tobytes() == before
