"""What the device gives: one large square product by the vendor's library, and one large copy.

The product takes turns with the rivals, so that it runs at their clocks, temperature and power.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .timing import Call, Prepare, quantiles, time_rivals

NAME = "one large matrix product"
# On a GPU, a size at which cuBLAS is near its best; on a CPU, one that is quick.
SIDE = {"cuda": 8192, "cpu": 256}
COPY = "one large copy"
COPY_BYTES = {"cuda": 4 << 30, "cpu": 1 << 20}


def product(dtype: torch.dtype, device: str) -> Prepare:
    side = SIDE[device]

    @contextmanager
    def prepare() -> Iterator[Call]:
        generator = torch.Generator(device=device).manual_seed(0)
        a, b = (
            torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        out = torch.empty_like(a)
        yield lambda: torch.mm(a, b, out=out)

    return prepare


def tflops(device: str, median_ms: float) -> float:
    return 2 * SIDE[device] ** 3 / (median_ms / 1e3) / 1e12


def copy(device: str) -> Prepare:
    @contextmanager
    def prepare() -> Iterator[Call]:
        generator = torch.Generator(device=device).manual_seed(0)
        size = COPY_BYTES[device] // 4
        source = torch.randint(0, 2**31 - 1, (size,), generator=generator, device=device).int()
        out = torch.empty_like(source)
        yield lambda: out.copy_(source)

    return prepare


def measure(device: str) -> dict[str, float]:
    """Both, alone on the device: the rate of bfloat16 products, and bytes read plus written."""
    rivals = {NAME: product(torch.bfloat16, device), COPY: copy(device)}
    samples = time_rivals(rivals, device=device, with_memory=False)
    for sample in samples.values():
        if sample.error is not None:
            raise sample.error
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes will want it
    product_ms, copy_ms = (quantiles(samples[name].times_ms).p50 for name in rivals)
    return {
        "product_tflops": tflops(device, product_ms),
        "copy_tbytes_per_s": 2 * COPY_BYTES[device] / (copy_ms / 1e3) / 1e12,
    }
