"""The position table (G, G, D) resampled to each image's grid of h x w patches (NaFlex).

    out[y, x] = sum_gk  A_h[y, g] A_w[x, k] table[g, k]

with A_n the (n, G) antialiased bilinear weights of F.interpolate(align_corners=False); SigLIP 2,
section 2.4.2. Each token reads the few cells that its two triangles cover: 4 where a grid grows,
up to G^2 where it shrinks to a point. The gradient visits the same pairs in a fixed order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.backend import Backend, choose, no_triton
from . import _chunked, reference

torch.library.define(
    "siglip2::posemb_resample",
    "(Tensor table, Tensor grid_hw, SymInt num_tokens, ScalarType dtype, str backend) -> Tensor",
)
torch.library.define(
    "siglip2::posemb_resample_bwd",
    "(Tensor dout, Tensor grid_hw, Tensor table, str backend) -> Tensor",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return _chunked


@torch.library.impl("siglip2::posemb_resample", "CompositeExplicitAutograd")
def _(table, grid_hw, num_tokens, dtype, backend):
    if num_tokens == 0:
        return table.new_empty(0, table.shape[2], dtype=dtype)
    return _backend(backend).fwd(table, grid_hw, num_tokens, dtype)


@torch.library.impl("siglip2::posemb_resample_bwd", "CompositeExplicitAutograd")
def _(dout, grid_hw, table, backend):
    if dout.shape[0] == 0:
        return torch.zeros_like(table)
    return _backend(backend).bwd(dout.contiguous(), grid_hw, table)


@torch.library.register_fake("siglip2::posemb_resample")
def _(table, grid_hw, num_tokens, dtype, backend):
    return table.new_empty(num_tokens, table.shape[2], dtype=dtype)


@torch.library.register_fake("siglip2::posemb_resample_bwd")
def _(dout, grid_hw, table, backend):
    return torch.empty_like(table)


_fwd = torch.ops.siglip2.posemb_resample.default
_bwd = torch.ops.siglip2.posemb_resample_bwd.default


def _setup(ctx, inputs, output):
    table, grid_hw, _, _, ctx.backend = inputs
    ctx.save_for_backward(table, grid_hw)


def _grad(ctx, dout):
    table, grid_hw = ctx.saved_tensors
    return _bwd(dout, grid_hw, table, ctx.backend), None, None, None, None


torch.library.register_autograd("siglip2::posemb_resample", _grad, setup_context=_setup)


def _unsupported(table: Tensor, grid_hw: Tensor) -> dict[str, str | None]:
    triton = no_triton(table)
    if triton is None:
        triton = _backend("triton").unsupported(table, grid_hw)
    chunked = _chunked.unsupported(table, grid_hw)
    return {
        "cuda": "there is no CUDA C++ kernel of this op",
        "triton": triton,
        "chunked": chunked,
        "reference": chunked,
    }


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    table = torch.empty(16, 16, 768, device=device)
    return _unsupported(table, torch.empty(0, 2, dtype=torch.int32))


def posemb_resample(
    table: Tensor,  # (G, G, D)
    grid_hw: Tensor | Sequence[tuple[int, int]],  # (B, 2) int32: patches down, across
    *,
    num_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (T, D)
    """Position of every patch of every image, in packed order; differentiable in `table`.

    Args:
        grid_hw: On the host, as collators make it; on the table's device `num_tokens` is needed,
            so that nothing waits for its sum. A side of 0 is an image without patches.
        num_tokens: T, the sum of h w.
        dtype: Of the result; None keeps the table's. Sums are float32.

    Equal to F.interpolate(mode="bilinear", antialias=True, align_corners=False), also where
    torch's own CPU kernel errs (a width of 1). Deterministic.

    Raises:
        ValueError: A shape or dtype is wrong, or num_tokens is not the sum of the grids.
        NotImplementedError: The asked-for backend does not take this input.
    """
    if table.ndim != 3 or table.shape[0] != table.shape[1] or not table.is_floating_point():
        raise ValueError(
            f"need a table (G, G, D) of floats; got {tuple(table.shape)} {table.dtype}"
        )
    if not isinstance(grid_hw, Tensor):
        grid_hw = torch.tensor(list(grid_hw), dtype=torch.int32).view(-1, 2)
    if grid_hw.ndim != 2 or grid_hw.shape[1] != 2 or grid_hw.dtype is not torch.int32:
        got = f"{tuple(grid_hw.shape)} {grid_hw.dtype}"
        raise ValueError(f"need grid_hw (B, 2) int32, or pairs; got {got}")
    num_tokens = _num_tokens(grid_hw, num_tokens)
    name = choose(backend, _unsupported(table, grid_hw), table.device)
    if name == "reference":
        rows = reference.posemb_resample(table, [(h, w) for h, w in grid_hw.tolist()])
        return rows.to(dtype or table.dtype)
    return _fwd(table, grid_hw, num_tokens, dtype or table.dtype, name)


def _num_tokens(grid_hw: Tensor, num_tokens: int | None) -> int:
    if num_tokens is not None and (grid_hw.is_cuda or torch.compiler.is_compiling()):
        return num_tokens  # looking would wait, or break the graph
    if grid_hw.is_cuda:
        raise ValueError("need num_tokens when grid_hw is on a device; got None")
    grids = grid_hw.tolist()
    least = min((min(grid) for grid in grids), default=0)
    if least < 0:
        raise ValueError(f"need sides of 0 or more; got {least}")
    total = sum(h * w for h, w in grids)
    if num_tokens not in (None, total):
        raise ValueError(f"need num_tokens {total}, the sum of the grids; got {num_tokens}")
    return total
