"""What a library's attention leaves to do, without a pass over whole tensors where none is needed.

FlashAttention does not write the rows behind the last sequence.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import fill_past

BLOCK = 1024
ELEMENTS = 4096  # of a tile that is copied


@triton.jit(do_not_specialize=("B", "T"))
def _clear_kernel(out_ptr, lse_ptr, cu_ptr, B, T, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    end = tl.load(cu_ptr + B)
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_lse = lse_ptr + T.to(tl.int64) * tl.program_id(1) + o_t
    b_lse = tl.load(p_lse, mask=o_t < T, other=0.0)
    is_empty = (b_lse == float("inf")) | (o_t >= end)
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
    tl.store(p_lse, nothing, mask=(o_t < T) & is_empty)
    if tl.program_id(1) == 0:
        fill_past(out_ptr, end.to(tl.int64) * WIDTH, T.to(tl.int64) * WIDTH, 0.0, BLOCK)


def clear_past(
    out: Tensor,  # (T, H, E), contiguous, written
    lse: Tensor,  # (H, T) float32, contiguous, written
    cu_seqlens: Tensor,  # (B+1,)
) -> None:
    """Zero and -inf in rows behind the last sequence; -inf for flash's empty sum, +inf."""
    T, H, E = out.shape
    B = cu_seqlens.shape[0] - 1
    grid = (triton.cdiv(T, BLOCK), H)
    _clear_kernel[grid](out, lse, cu_seqlens, B, T, WIDTH=H * E, BLOCK=BLOCK)


@triton.jit(do_not_specialize=("B", "T"))
def _place_kernel(
    x_ptr,  # (T, WIDTH)
    cu_ptr,  # (B+1,)
    out_ptr,  # (T, WIDTH)
    B,
    T,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    end = tl.load(cu_ptr + B)
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_x = (o_t < tl.minimum(end, T))[:, None]
    b_x = tl.load(x_ptr + o_t[:, None] * WIDTH + o_c[None, :], mask=m_x, other=0.0)
    tl.store(out_ptr + o_t[:, None] * stride + o_c[None, :], b_x, mask=(o_t < T)[:, None])


def place(
    x: Tensor,  # (T, H, E), contiguous
    out: Tensor,  # (T, H, E): written; may be a slice of (T, 3, H, E)
    cu_seqlens: Tensor,  # (B+1,)
) -> None:
    """`x` into `out`, zero in rows behind the last sequence: one read and one write."""
    T, H, E = x.shape
    width = H * E
    columns = min(width & -width, ELEMENTS)  # the largest power of two that divides
    rows = ELEMENTS // columns
    _place_kernel[(triton.cdiv(T, rows), width // columns)](
        x,
        cu_seqlens,
        out,
        cu_seqlens.shape[0] - 1,
        T,
        out.stride(0),
        WIDTH=width,
        ROWS=rows,
        COLUMNS=columns,
    )
