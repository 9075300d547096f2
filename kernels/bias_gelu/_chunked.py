"""Eager backend: torch's own GELU and its gradient, in float32, a chunk of rows at a time."""

import torch
from torch import Tensor

from .._core.chunks import row_chunks

MAX_ELEMENTS = 1 << 20  # of a chunk: what the second look at it finds in the cache


def _chunks(h: Tensor) -> list[slice]:
    return [slice(*rows) for rows in row_chunks(*h.shape, MAX_ELEMENTS)]


def fwd(h: Tensor, bias: Tensor) -> Tensor:  # (T, M), (M,) -> (T, M)
    y, acc = torch.empty_like(h), torch.promote_types(h.dtype, torch.float32)
    for rows in _chunks(h):
        y[rows] = torch._C._nn.gelu_(h[rows].to(acc) + bias, approximate="tanh")
    return y


def bwd(dy: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # (T, M), (M,)
    acc = torch.promote_types(h.dtype, torch.float32)
    dh, dbias = torch.empty_like(h), h.new_zeros(h.shape[1], dtype=acc)
    for rows in _chunks(h):
        z = h[rows].to(acc) + bias
        dz = torch.ops.aten.gelu_backward(dy[rows].to(acc), z, approximate="tanh")
        dbias += dz.sum(0)
        dh[rows] = dz
    return dh, dbias
