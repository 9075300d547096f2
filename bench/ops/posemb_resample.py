"""The position table at every image's grid, for grids as COCO's pictures give them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import posemb_resample
from siglip2_kernels.posemb_resample.reference import posemb_resample as specification

from ..case import Case, Cost, Rival

SIDE = 16  # of the learned table
# The most frequent grids of COCO's pictures at a budget of 256 patches.
GRIDS = ((13, 19), (14, 18), (18, 14), (19, 13), (16, 16), (12, 21), (15, 17), (21, 12))


def grids(B: int) -> list[tuple[int, int]]:
    return [GRIDS[i % len(GRIDS)] for i in range(B)]


def make(
    *, B: int, D: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> list[Tensor]:  # (16, 16, D), (B, 2)
    table = torch.randn(SIDE, SIDE, D, device=device, generator=generator)
    return [table.requires_grad_(), torch.tensor(grids(B), dtype=torch.int32)]


def reference(table: Tensor, grid_hw: Tensor) -> Tensor:  # (T, D)
    return specification(table, [(h, w) for h, w in grid_hw.tolist()])


def _planes(table: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    planes = table.permute(2, 0, 1)[None]
    made = (F.interpolate(planes, size, mode="bilinear", antialias=True) for size in sizes)
    return [plane[0].flatten(1).T for plane in made]


def loop(table: Tensor, grid_hw: Tensor) -> Tensor:
    """Image after image, as transformers does."""
    return torch.cat(_planes(table, [(h, w) for h, w in grid_hw.tolist()]))


def distinct(table: Tensor, grid_hw: Tensor) -> Tensor:
    """Each distinct grid once, as timm does."""
    sizes = [(h, w) for h, w in grid_hw.tolist()]
    unique = list(dict.fromkeys(sizes))
    made = dict(zip(unique, _planes(table, unique), strict=True))
    return torch.cat([made[size] for size in sizes])


def cost(*, B: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    tokens = sum(h * w for h, w in grids(B))
    table_bytes, out_bytes = SIDE * SIDE * D * 4, tokens * D * 4
    forward = Cost(flops=8 * tokens * D, num_bytes=table_bytes + out_bytes)
    full = Cost(flops=16 * tokens * D, num_bytes=2 * table_bytes + 2 * out_bytes)
    return {"forward": forward, "full": full}


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def build() -> Callable[..., Tensor]:
        return partial(posemb_resample, backend=backend)

    return Rival(build=build, needs_cuda=needs_cuda, is_ours=True)


CASE = Case(
    x_name="B",
    x_label="images",
    shapes=[{"B": 9, "D": 32}, *({"B": B, "D": D} for D in (768, 1152) for B in (64, 256))],
    check_shapes={"cpu": {"B": 9, "D": 32}, "cuda": {"B": 33, "D": 1152}},
    make=make,
    reference=reference,
    rivals={
        "loop": Rival(build=lambda: loop),
        "distinct": Rival(build=lambda: distinct),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
    },
    cost=cost,
    dtypes=(torch.float32,),
)
