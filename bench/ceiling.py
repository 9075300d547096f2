"""The yardstick of matrix products: one large square product by the vendor's library.

It takes turns with the rivals, so that it runs at their clocks, temperature and power.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .timing import Call, Prepare

NAME = "one large matrix product"
# On a GPU, a size at which cuBLAS is near its best; on a CPU, one that is quick.
SIDE = {"cuda": 8192, "cpu": 256}


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
