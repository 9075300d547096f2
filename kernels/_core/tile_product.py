"""Triton kernels whose epilogue works on tiles of A B^T: the product, its tiles, who reads them.

A (T, D) and B (V, D) have their depth last. A kernel walks over tiles, makes each one here, and
takes it in pieces of its columns, because an epilogue on a whole tile spills registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    BT: int  # rows of a tile
    BV: int  # columns of a tile
    BD: int  # depth of one step of the product
    pieces: int  # 2, 4 or 8 in which the epilogue takes the columns
    num_warps: int
    num_stages: int
    blocks: int  # that share a multiprocessor: one multiplies while another is in its epilogue
    is_flat: bool  # loops over tiles and depth are one, so loads run ahead through the epilogue

    @property
    def maxnreg(self) -> int | None:
        """Registers of a thread with which so many blocks fit; None: no limit but the machine's."""
        most = 65536 // (self.blocks * self.num_warps * 32) // 8 * 8
        return most if most < 255 else None


def capability_of(x: Tensor) -> tuple[int, int]:
    """Of the tensor's GPU; Hopper's under the interpreter, so that its tests see descriptors."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def has_tma(dtype: torch.dtype, capability: tuple[int, int], *matrices: Tensor) -> bool:
    """Whether tensor descriptors can read the rows of `matrices` (CUDA guide, 10.29.1)."""
    return (
        dtype is not torch.float32
        and capability[0] in (9, 10)
        and all(
            x.data_ptr() % 16 == 0 and x.stride(0) > 0 and x.stride(0) * x.itemsize % 16 == 0
            for x in matrices
        )
    )


def num_programs(tile: Tile, device: torch.device) -> int:
    """As many as run at a time; few under the interpreter, so that its tests see the loop."""
    if device.type != "cuda":
        return 4
    return tile.blocks * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def tile_at(i_tile, T, V, BT: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles of rows go through all columns side by side."""
    num_t, num_v = tl.cdiv(T, BT), tl.cdiv(V, BV)
    first_t = i_tile // (GROUP * num_v) * GROUP
    group = tl.minimum(num_t - first_t, GROUP)
    within = i_tile % (GROUP * num_v)
    return first_t + within % group, within // group


@triton.jit
def product_tile(
    a,  # pointer, or tensor descriptor of blocks [BT, BD] if HAS_TMA
    b,  # likewise, [BV, BD]
    i_t,
    i_v,
    T,
    V,
    stride_a,
    stride_b,
    D: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    HAS_TMA: tl.constexpr,
):
    b_z = tl.zeros((BT, BV), tl.float32)
    if not HAS_TMA:
        # Rows past the end repeat the last one: loads need no mask, the epilogue drops them.
        o_t = tl.minimum(i_t * BT + tl.arange(0, BT), T - 1).to(tl.int64)
        o_v = tl.minimum(i_v * BV + tl.arange(0, BV), V - 1).to(tl.int64)
        o_d = tl.arange(0, BD)
        p_a = a + o_t[:, None] * stride_a + o_d[None, :]
        p_b = b + o_v[:, None] * stride_b + o_d[None, :]
    for d in range(0, D, BD):
        if HAS_TMA:
            b_a = a.load([i_t * BT, d])  # [BT, BD], 0 outside
            b_b = b.load([i_v * BV, d])  # [BV, BD]
        elif D % BD == 0:
            b_a = tl.load(p_a + d)
            b_b = tl.load(p_b + d)
        else:
            m_d = o_d[None, :] < D - d
            b_a = tl.load(p_a + d, mask=m_d, other=0.0)
            b_b = tl.load(p_b + d, mask=m_d, other=0.0)
        # "ieee" keeps float32 inputs from TF32; half-precision products are exact either way.
        if b_a.dtype == tl.float32:
            # Sums of BD terms, and the sum of those: one sum over D = 1152 errs ten times as much,
            # which is what the compiler would make of it without the limit.
            b_z += tl.dot(b_a, b_b.T, input_precision="ieee", max_num_imprecise_acc=BD)
        else:
            b_z = tl.dot(b_a, b_b.T, b_z, input_precision="ieee")
    return b_z  # [BT, BV]


@triton.jit
def _halves(b, BT: tl.constexpr, BN: tl.constexpr):
    return b.reshape(BT, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def split_columns(b, BT: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr):
    """b [BT, BN] as a tuple of 2, 4 or 8 blocks, from left to right."""
    pieces = _halves(b, BT, BN)
    if PIECES >= 4:
        pieces = _halves(pieces[0], BT, BN // 2) + _halves(pieces[1], BT, BN // 2)
    if PIECES == 8:
        left = _halves(pieces[0], BT, BN // 4) + _halves(pieces[1], BT, BN // 4)
        pieces = left + _halves(pieces[2], BT, BN // 4) + _halves(pieces[3], BT, BN // 4)
    return pieces
