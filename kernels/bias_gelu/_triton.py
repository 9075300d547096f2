"""Triton backend: a program makes a band of columns over many rows, and their sum on the way.

torch.compile writes dh and reads it again to sum it. Here a program's sum stays in registers: the
backward reads dy and h and writes dh, 6 bytes an element in 16 bits instead of 8. The sum is kept
per place of the tile: to reduce every tile over its rows crosses warps, with barriers, and halved
the pass's bandwidth on an H100.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.triton_math import sigmoid


class Tile(NamedTuple):
    ROWS: int
    COLUMNS: int  # loads are 16 bytes a thread
    TILES: int  # of one program; in the backward their rows share one partial sum
    num_warps: int


FWD = Tile(ROWS=16, COLUMNS=256, TILES=4, num_warps=8)  # 98 % of an H100's copy
BWD = Tile(ROWS=8, COLUMNS=256, TILES=16, num_warps=4)  # 72 registers a thread; not timed yet


def unsupported(h: Tensor) -> str | None:
    if h.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {h.dtype}"
    return None


@triton.jit
def _gate(z):
    """sigmoid(2 u) and u' of gelu(z) = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    square = z * z
    u = 0.7978845608028654 * z * (1.0 + 0.044715 * square)
    return sigmoid(2.0 * u), 0.7978845608028654 * (1.0 + 0.134145 * square)


@triton.jit
def _tile(i_tile, T, M, o_m, ROWS: tl.constexpr):
    """Offsets (int64) and mask of a tile of rows by columns `o_m`."""
    o_t = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = (o_t < T)[:, None] & (o_m < M)[None, :]
    return o_t[:, None] * M + o_m[None, :], m


@triton.jit(do_not_specialize=("T",))
def _fwd_kernel(
    h_ptr,  # (T, M)
    bias_ptr,  # (M,)
    y_ptr,  # (T, M)
    T,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    o_m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_bias = tl.load(bias_ptr + o_m, mask=o_m < M, other=0.0).to(tl.float32)
    for i in range(TILES):
        o, m = _tile(tl.program_id(0) * TILES + i, T, M, o_m, ROWS)
        b_z = tl.load(h_ptr + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
        b_gate, _ = _gate(b_z)
        tl.store(y_ptr + o, (b_z * b_gate).to(y_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("T",))
def _bwd_kernel(
    dy_ptr,  # (T, M)
    h_ptr,  # (T, M)
    bias_ptr,  # (M,)
    dh_ptr,  # (T, M)
    partial_ptr,  # (num_programs, M) float32
    T,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    o_m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_bias = tl.load(bias_ptr + o_m, mask=o_m < M, other=0.0).to(tl.float32)
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(TILES):
        o, m = _tile(tl.program_id(0) * TILES + i, T, M, o_m, ROWS)
        b_z = tl.load(h_ptr + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
        b_dy = tl.load(dy_ptr + o, mask=m, other=0.0).to(tl.float32)
        b_gate, b_slope = _gate(b_z)
        b_dh = b_dy * b_gate * (1.0 + 2.0 * b_z * (1.0 - b_gate) * b_slope)
        tl.store(dh_ptr + o, b_dh.to(dh_ptr.dtype.element_ty), mask=m)
        b_sum += b_dh  # 0 in rows past the end: their dy is
    p_partial = partial_ptr + tl.program_id(0).to(tl.int64) * M + o_m
    tl.store(p_partial, tl.sum(b_sum, 0), mask=o_m < M)


def _grid(h: Tensor, tile: Tile) -> tuple[int, int]:
    T, M = h.shape
    return triton.cdiv(T, tile.ROWS * tile.TILES), triton.cdiv(M, tile.COLUMNS)


def fwd(h: Tensor, bias: Tensor) -> Tensor:  # (T, M), (M,) -> (T, M)
    (T, M), y = h.shape, torch.empty_like(h)
    _fwd_kernel[_grid(h, FWD)](h, bias, y, T, M=M, **FWD._asdict())
    return y


def bwd(dy: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # (T, M), (M,) float32
    (T, M), dh, grid = h.shape, torch.empty_like(h), _grid(h, BWD)
    partial = h.new_empty(grid[0], M, dtype=torch.float32)
    _bwd_kernel[grid](dy, h, bias, dh, partial, T, M=M, **BWD._asdict())
    return dh, partial.sum(0)
