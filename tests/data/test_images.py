import io
import struct
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
    patchify,
)
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


def test_patches_are_row_major_with_channels_last_inside():
    P, H, W = 2, 4, 6
    pixels = torch.arange(H * W * 3).view(H, W, 3)
    expected = []
    for top in range(0, H, P):
        for left in range(0, W, P):
            for y in range(P):
                for x in range(P):
                    expected.extend(pixels[top + y, left + x].tolist())
    assert patchify(pixels, P).flatten().tolist() == expected


def test_patchify_rejects_sides_that_do_not_divide():
    with pytest.raises(ValueError, match=r"divisible by patch_size 4; got \(6, 8\)"):
        patchify(torch.zeros(6, 8, 3), 4)


def test_naflex_patches_are_those_of_the_resized_picture():
    image = noise(60, 100)
    out = NaflexTransform(16, 40)(encoded(image))
    H, W = naflex_size(60, 100, 16, 40)
    resized = np.array(image.resize((W, H), Image.Resampling.BILINEAR))
    assert out.patches.dtype == torch.uint8
    assert torch.equal(out.patches, patchify(torch.from_numpy(resized), 16))
    assert out.grid_hw.tolist() == [[H // 16, W // 16]]
    assert out.cu_seqlens.tolist() == [0, H * W // 256]


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


def test_fixed_squashes_with_pillows_bilinear_and_maps_to_minus_one_to_one():
    image = noise(50, 90)
    out = FixedTransform(32)(encoded(image))
    pixels = np.array(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    torch.testing.assert_close(out, torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1))
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


def test_the_pixel_limit_is_a_parameter():
    data = encoded(noise(10, 10))
    assert FixedTransform(4, max_image_pixels=100)(data).shape == (3, 4, 4)
    with pytest.raises(BadSampleError, match="more than 99 pixels"):
        NaflexTransform(4, 4, max_image_pixels=99)(data)
