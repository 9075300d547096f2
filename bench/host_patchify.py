"""Host work of NaFlex: pictures to packed patches, beside transformers' processor and numpy.

`python -P -m siglip2_bench.host_patchify [--json FILE.json] [--loader]` prints tables. Times of
calls are processor time of one thread, which other load of the machine stretches least, medians
over rounds in which the rivals take turns; the loader's rates are by the clock.
"""

import argparse
import importlib.util
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siglip2.data.images import NaflexTransform, decode_image, naflex_size
from siglip2.data.loader import TrainLoader
from siglip2.data.packing import pack_patches, packing_backend
from siglip2.data.sources import IndexedSource
from siglip2.data.types import Example
from siglip2.errors import require

from .report import markdown_table

P = 16
PICTURES = ((480, 640), (1080, 1920))  # (height, width)
BUDGETS = (256, 1024)
BATCH = 8  # images of one call; 32 at 1,024 patches leave the cache, and memory is measured alone
LOADER_BATCH = 32
GREY_LEVELS = 2  # ours against Pillow's resize
Row = dict[str, Any]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:  # (H, W, 3) uint8
    """Waves, blocks and grain, so that a JPEG of it takes about the bytes of a photo's."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 90 * np.sin(x / 37 + seed) * np.cos(y / 23)
    pixels = np.stack([x / width * 255, y / height * 255, waves], -1)
    blocks = rng.normal(0, 25, (height // 8, width // 8, 3))
    pixels += blocks.repeat(8, 0).repeat(8, 1) + rng.normal(0, 6, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    Image = require("PIL.Image", "data")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=88)
    return out.getvalue()


def has_processor() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _processor(budget: int) -> Callable[[list[Any]], Any]:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    processor = Siglip2ImageProcessorPil(patch_size=P, max_num_patches=budget)
    return lambda images: processor(images=images, max_num_patches=budget, return_tensors="pt")


def median_us(calls: dict[str, Callable[[], Any]], *, min_s: float) -> dict[str, float]:
    """Median processor time of each call; the calls take turns for `min_s` each on average."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + min_s * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def _transform_calls(height: int, width: int, budget: int) -> dict[str, Callable[[], Any]]:
    """One decoded picture to patches. Raises AssertionError if the rivals do not agree."""
    Image = require("PIL.Image", "data")
    image = Image.fromarray(picture(height, width))
    ours = NaflexTransform(P, budget)
    if not has_processor():
        return {"siglip2": lambda: ours(image)}
    theirs = _processor(budget)
    patches = ours(image).patches
    expected = (theirs([image])["pixel_values"][0, : len(patches)] + 1) * 127.5
    worst = float((patches - expected).abs().max())
    assert worst < GREY_LEVELS + 0.01, f"{worst} grey levels from transformers"
    return {
        "siglip2": lambda: ours(image),
        "transformers (PIL)": lambda: theirs([image]),
    }


def _numpy_patches(image: np.ndarray) -> np.ndarray:  # (H, W, 3) -> (T, P*P*3)
    H, W, C = image.shape
    cut = image.reshape(H // P, P, W // P, P, C).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cut).reshape(-1, P * P * C)


def _torch_patches(image: Tensor) -> Tensor:  # (H, W, 3) -> (T, P*P*3)
    H, W, C = image.shape
    return image.view(H // P, P, W // P, P, C).transpose(1, 2).reshape(-1, P * P * C)


def _patchify_calls(height: int, width: int, budget: int) -> dict[str, Callable[[], Any]]:
    """A batch of resized uint8 images to packed patches, of both layouts that resizes give."""
    H, W = naflex_size(height, width, P, budget)
    last = [torch.from_numpy(picture(H, W, seed)) for seed in range(BATCH)]
    planar = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) for image in last]
    arrays, planar_arrays = ([image.numpy() for image in images] for images in (last, planar))
    by_numpy = lambda images: np.concatenate([_numpy_patches(image) for image in images])
    by_torch = lambda images: torch.cat([_torch_patches(image) for image in images])
    expected = torch.from_numpy(by_numpy(arrays))
    for images in (last, planar):
        assert torch.equal(pack_patches(images, P).patches, expected)
    return {
        "siglip2": partial(pack_patches, last, P, threads=1),
        "numpy": partial(by_numpy, arrays),
        "torch": partial(by_torch, last),
        "siglip2, planar": partial(pack_patches, planar, P, threads=1),
        "numpy, planar": partial(by_numpy, planar_arrays),
    }


class _Jpegs(IndexedSource):
    """Encoded pictures in memory, so that nothing but the loader is measured."""

    def __init__(self, height: int, width: int, count: int = LOADER_BATCH):
        super().__init__("jpegs")
        self._data = [jpeg(picture(height, width, seed)) for seed in range(count)]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        return Example(str(index), self._data[index], {"en": "caption"}, group=str(index))


class _ProcessorTransform:
    """transformers' processor in the place of ours: batches of padded float patches."""

    def __init__(self, budget: int):
        self._process = _processor(budget)

    def prepare(self, data: bytes) -> Any:
        return decode_image(data)

    def stack(self, images: list[Any]) -> Tensor:
        return self._process(images)["pixel_values"]

    def finish(self, batch: Tensor) -> Tensor:
        return batch


def _no_text(texts: Sequence[str]) -> Tensor:
    return torch.zeros(len(texts), 1, dtype=torch.int64)


def images_per_s(transform: Any, source: IndexedSource, *, workers: int, min_s: float) -> float:
    loader = TrainLoader(source, transform, _no_text, batch_size=LOADER_BATCH, workers=workers)
    # Those read ahead while the readers started are not counted.
    for _ in range(2 + 2 * workers):
        next(loader)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < min_s:
        next(loader)
        batches += 1
    elapsed = time.perf_counter() - start
    loader.close()
    return batches * LOADER_BATCH / elapsed


def measure_loader(min_s: float) -> list[Row]:
    rows = []
    for height, width in PICTURES:
        source = _Jpegs(height, width)
        for budget in BUDGETS:
            rivals = {
                "siglip2": NaflexTransform(P, budget),
                "siglip2, jpeg_draft": NaflexTransform(P, budget, jpeg_draft=True),
            }
            if has_processor():
                rivals["transformers (PIL)"] = _ProcessorTransform(budget)
            for workers in (0, 2):
                for name, transform in rivals.items():
                    rate = images_per_s(transform, source, workers=workers, min_s=min_s)
                    row = {"what": f"loader, {workers} workers", "picture": f"{width} x {height}"}
                    rows.append({**row, "budget": budget, "rival": name, "images_per_s": rate})
    return rows


def measure_calls(min_s: float) -> list[Row]:
    rows = []
    for height, width in PICTURES:
        for budget in BUDGETS:
            for what, make, images in (
                ("picture to patches", _transform_calls, 1),
                ("patchify", _patchify_calls, BATCH),
            ):
                times = median_us(make(height, width, budget), min_s=min_s)
                row = {"what": what, "picture": f"{width} x {height}", "budget": budget}
                rows += [{**row, "rival": n, "us_per_image": t / images} for n, t in times.items()]
    return rows


def table(rows: list[Row]) -> str:
    """One line a picture and budget, one column a rival."""
    blocks = []
    for what in dict.fromkeys(row["what"] for row in rows):
        chosen = [row for row in rows if row["what"] == what]
        metric = "us_per_image" if "us_per_image" in chosen[0] else "images_per_s"
        rivals = list(dict.fromkeys(row["rival"] for row in chosen))
        cells = {(r["picture"], r["budget"], r["rival"]): f"{r[metric]:,.0f}" for r in chosen}
        places = dict.fromkeys((row["picture"], row["budget"]) for row in chosen)
        lines = [[p, str(b), *(cells[p, b, rival] for rival in rivals)] for p, b in places]
        head = [f"{what}: {metric}", "patches", *rivals]
        blocks.append(markdown_table(head, lines))
    return "\n\n".join("\n".join(block) for block in blocks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="siglip2_bench.host_patchify", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--loader", action="store_true", help="also measure the whole loader")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure_calls(args.seconds)
    if args.loader:
        rows += measure_loader(args.seconds)
    load = os.getloadavg()[0]
    print(f"packing by {packing_backend()}; load of the machine, this included: {load:.1f}\n")
    print(table(rows))
    if not has_processor():
        print("\ntransformers (PIL) skipped: not installed (pip install transformers)")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"load": load, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
