"""Rows over their norms, u = x / (||x|| + EPS), and gradients back through that division.

    dx = d / (||x|| + EPS) - u <u, d> / ||x||

The second term is 0 where x is 0, as autograd has it: dx = d / EPS there. Sums are float32 (float64
for float64 rows). The input's rows are all that the way back needs; their norms are made again.
"""

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-8  # what the released models add to the norm
RowsBackend = Literal["eager", "triton"]


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision rows become float16: in [-1, 1] it has 11 bits where bfloat16 has 8."""
    return torch.float16 if dtype.itemsize == 2 else dtype


def unit_rows(
    x: Tensor,  # (B, D)
    backend: RowsBackend = "eager",
) -> Tensor:  # (B, D) of unit_dtype(x.dtype), contiguous
    u = torch.empty(x.shape, dtype=unit_dtype(x.dtype), device=x.device)
    if backend == "triton":
        from . import unit_rows_triton

        unit_rows_triton.unit_rows(x, u, EPS)
        return u
    return torch.div(x, _norms(x).add_(EPS), out=u)


def unit_rows_grad(
    d: Tensor,  # (B, D) float32 or float64, gradient of the unit rows
    x: Tensor,  # (B, D)
    scale: Tensor,  # (), dtype of d
    dtype: torch.dtype,
    backend: RowsBackend = "eager",
) -> Tensor:  # (B, D) of `dtype`
    """scale * (gradient of x), rounded once."""
    if backend == "triton":
        from . import unit_rows_triton

        dx = torch.empty(d.shape, dtype=dtype, device=d.device)
        unit_rows_triton.unit_rows_grad(d, x, scale, dx, EPS)
        return dx
    norm = _norms(x)
    inverse = 1 / (norm + EPS)
    # Divided step by step: each quotient stays in range however small the row is.
    along = (d * x).sum(-1, keepdim=True).mul_(inverse).div_(norm).masked_fill_(norm == 0, 0)
    dx = (d * (scale * inverse)).addcmul_(x, along.mul_(inverse).mul_(scale), value=-1)
    return dx.to(dtype)


def _norms(x: Tensor) -> Tensor:  # (B, 1)
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
