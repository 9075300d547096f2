import io

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2.data import packing
from siglip2.data.emoji_art import twemoji
from siglip2.data.packing import has_host, pack_patches, patch_coords, resize_uint8
from siglip2.errors import DataError

P = 4
SIZES = {
    "one-patch": [(P, P)],
    "ragged": [(8, 12), (4, 400), (400, 4), (20, 20)],
    "many": [(4 * (1 + i % 5), 4 * (1 + i % 3)) for i in range(50)],
}
RELEASED_PATCHES = (14, 16, 32)  # 14 and 16 are copied by code of their own


@pytest.fixture(
    params=[
        pytest.param("c++", marks=pytest.mark.skipif(not has_host(), reason="_host is not built")),
        "numpy",
    ]
)
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(packing, "_host", None)
    return request.param


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def patches_by_hand(image, patch_size):
    """(y, x) of patches, then (y, x, channel) inside each, one pixel at a time."""
    found = []
    for top in range(0, image.shape[0], patch_size):
        for left in range(0, image.shape[1], patch_size):
            for y in range(patch_size):
                for x in range(patch_size):
                    found += image[top + y, left + x].tolist()
    return found


@pytest.mark.parametrize("threads", [1, 3, None])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_patches_are_row_major_with_channels_last_inside(sizes, threads, backend):
    images = [noise(h, w, seed=i) for i, (h, w) in enumerate(sizes)]
    packed = pack_patches(images, P, threads=threads)
    assert packed.patches.flatten().tolist() == [x for i in images for x in patches_by_hand(i, P)]
    assert packed.patches.dtype == torch.uint8
    lengths = [h * w // P**2 for h, w in sizes]
    assert packed.grid_hw.tolist() == [[h // P, w // P] for h, w in sizes]
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(sizes) + 1)]
    assert packed.grid_hw.dtype == packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == max(lengths)


@pytest.mark.parametrize("patch_size", RELEASED_PATCHES)
def test_released_patch_sizes(patch_size, backend):
    image = noise(2 * patch_size, 3 * patch_size)
    expected = patches_by_hand(image, patch_size)
    assert pack_patches([image], patch_size).patches.flatten().tolist() == expected


LAYOUTS = {
    "planar": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "window": lambda x: torch.nn.functional.pad(x, (0, 0, 5, 3, 2, 7))[2:-7, 5:-3],
    "every-other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "four-channels": lambda x: torch.cat([x, x[..., :1]], 2)[..., :3],
    "mirrored": lambda x: x.flip(0, 1, 2).numpy()[::-1, ::-1, ::-1],
    "read-only": lambda x: np.frombuffer(bytes(x.numpy()), np.uint8).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(layout, backend):
    plain = noise(3 * P, 5 * P)
    image = layout(plain)
    assert np.array_equal(np.asarray(image), plain.numpy())
    expected = pack_patches([plain, plain], P).patches
    assert torch.equal(pack_patches([image, plain], P).patches, expected)


def test_out_is_written_from_its_first_row_and_no_further(backend):
    images = [noise(8, 8), noise(4, 12)]
    out = torch.full((9, 3 * P**2), 7, dtype=torch.uint8)
    packed = pack_patches(images, P, out=out)
    assert packed.patches.data_ptr() == out.data_ptr()
    assert torch.equal(packed.patches, pack_patches(images, P).patches)
    assert out[7:].unique().tolist() == [7]


WRONG_OUTS = {
    "short": lambda: torch.empty(3, 48, dtype=torch.uint8),
    "narrow": lambda: torch.empty(4, 47, dtype=torch.uint8),
    "float": lambda: torch.empty(4, 48),
    "strided": lambda: torch.empty(4, 96, dtype=torch.uint8)[:, ::2],
}


@pytest.mark.parametrize("make", WRONG_OUTS.values(), ids=WRONG_OUTS)
def test_an_out_that_does_not_fit_is_refused(make, backend):
    with pytest.raises(DataError, match=r"need out \(4 or more, 48\) uint8, contiguous"):
        pack_patches([noise(8, 8)], P, out=make())


def test_no_images_make_an_empty_batch(backend):
    packed = pack_patches([], P)
    assert packed.patches.shape == (0, 3 * P**2)
    assert packed.grid_hw.shape == (0, 2)
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.max_seqlen == 0


def test_one_giant_image_and_a_line_of_patches(backend):
    giant, line = noise(4096, 4096), noise(16, 96_000)
    packed = pack_patches([giant, line], 16)
    assert packed.cu_seqlens.tolist() == [0, 65536, 71536]
    assert packed.max_seqlen == 65536
    last = giant[-16:, -16:].flatten()
    assert torch.equal(packed.patches[65535], last)
    assert torch.equal(packed.patches[-1], line[:, -16:].flatten())


BAD_IMAGES = {
    "no-height": (noise(0, 8), r"\(0, 8, 3\)"),
    "no-width": (noise(8, 0), r"\(8, 0, 3\)"),
    "not-whole-patches": (noise(1, 100_000), r"\(1, 100000, 3\)"),
    "float": (noise(8, 8).float(), r"torch\.float32"),
    "int8": (np.zeros((8, 8, 3), np.int8), "int8"),
    "grey": (noise(8, 8)[..., 0], r"\(8, 8\)"),
    "four-channels": (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
    "channels-first": (noise(8, 8).permute(2, 0, 1), r"\(3, 8, 8\)"),
    "another-device": (noise(8, 8).to("meta"), "a tensor on meta"),
    "list": ([[[0, 0, 0]]], "list"),
}


@pytest.mark.parametrize(("bad", "said"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_image_is_named_by_its_place(bad, said, backend):
    with pytest.raises(DataError, match=rf"multiples of 4; image 2 is {said}$"):
        pack_patches([noise(8, 8), noise(4, 8), bad, noise(8, 4)], P)


def test_patch_size_and_threads_are_positive(backend):
    with pytest.raises(DataError, match="need patch_size >= 1; got 0"):
        pack_patches([noise(8, 8)], 0)
    with pytest.raises(DataError, match="need threads >= 1; got 0"):
        pack_patches([noise(8, 8)], P, threads=0)


def test_the_report_says_which_backend_packs(backend):
    assert packing.packing_backend().startswith("C++" if backend == "c++" else "numpy (siglip2._ho")


def test_coords_count_rows_then_columns_of_each_image():
    coords = patch_coords(torch.tensor([[2, 3], [0, 5], [1, 2]], dtype=torch.int32))
    assert coords.dtype == torch.int32
    assert coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1]]


def sheet(columns=9, rows=7):
    """A picture of 640 x 480 made of drawings: hard edges, flat areas, a gradient behind them."""
    draw = twemoji(72)
    faces = [drawn for code in range(0x1F600, 0x1F700) if (drawn := draw(chr(code)))]
    y, x = np.mgrid[:480, :640]
    backdrop = np.stack([x / 639 * 255, y / 479 * 255, (x + y) % 256], -1).astype(np.uint8)
    image = Image.fromarray(backdrop)
    for i, face in enumerate(faces[: columns * rows]):
        with Image.open(io.BytesIO(face)) as drawing:
            drawing = drawing.convert("RGBA")
            image.paste(drawing, (i % columns * 71, i // columns * 69), drawing)
    return image


def gradient(height, width):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x / width * 255, y / height * 255, (x * 3 + y) % 256], -1)
    grain = np.random.default_rng(0).normal(0, 12, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


PICTURES = {
    "drawings": sheet,
    "gradient-480x640": lambda: gradient(480, 640),
    "gradient-1080x1920": lambda: gradient(1080, 1920),
    "small": lambda: gradient(37, 53),
    "row": lambda: gradient(1, 5000),
    "column": lambda: gradient(5000, 1),
    "pixel": lambda: gradient(1, 1),
}


@pytest.mark.parametrize(
    "size", [(224, 288), (432, 576), (32, 32), (16, 1024), (1024, 16)], ids=str
)
@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_resize_is_pillows_within_two_grey_levels(make, size):
    picture = make()
    theirs = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    ours = resize_uint8(torch.from_numpy(np.array(picture)), size)
    assert ours.is_contiguous()
    assert np.abs(ours.numpy() - theirs).max() <= 2


def test_resize_takes_any_layout_and_leaves_its_own_size_alone():
    image = noise(30, 50)
    planar = LAYOUTS["planar"](image)
    assert torch.equal(resize_uint8(planar, (16, 16)), resize_uint8(image, (16, 16)))
    assert resize_uint8(image, (30, 50)) is image


@pytest.mark.parametrize(
    ("image", "size", "said"),
    [
        (noise(0, 8), (16, 16), r"\(0, 8, 3\)"),
        (noise(8, 8).float(), (16, 16), r"torch\.float32"),
        (noise(8, 8).permute(2, 0, 1), (16, 16), r"\(3, 8, 8\)"),
        (noise(8, 8), (16, 0), r"\(16, 0\)"),
    ],
    ids=["empty", "float", "channels-first", "size"],
)
def test_resize_says_what_it_needs(image, size, said):
    with pytest.raises(DataError, match=rf"need an image \(H, W, 3\) uint8 .*; got {said}$"):
        resize_uint8(image, size)
