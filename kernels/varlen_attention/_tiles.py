"""Rows of a head as tiles: a width of 72 is a tile of 64 columns and one of 16, not one of 128.

A pair of tiles (x0, x1) holds columns [0, E0) and [E0, E0 + E1); without a second part E1 is 0 and
x1 stands for nothing. The head width is a compile-time constant: as a run-time stride 72 is
no multiple of 16 and loads are not vectorised.
"""

import triton
import triton.language as tl


def split_width(E: int) -> tuple[int, int]:
    """E0 and E1: powers of two, at least 16, that together cover E."""
    first = max(16, 1 << (E.bit_length() - 1))
    rest = max(E - first, 0)
    return first, max(16, 1 << (rest - 1).bit_length()) if rest else 0


@triton.jit
def _mask(m_rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    m = m_rows[:, None]
    if FIRST + WIDTH > E:
        m = m & (FIRST + tl.arange(0, WIDTH) < E)[None, :]
    return m


@triton.jit
def load_pair(ptr, o_rows, stride, m_rows, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Rows `o_rows` of one head. What a mask leaves out is 0: another image's inf must not come in,
    since 0 * inf is NaN."""
    p_rows = ptr + o_rows[:, None] * stride
    x0 = tl.load(p_rows + tl.arange(0, E0)[None, :], mask=_mask(m_rows, 0, E0, E), other=0.0)
    x1 = x0
    if E1 > 0:
        o_e = E0 + tl.arange(0, E1)
        x1 = tl.load(p_rows + o_e[None, :], mask=_mask(m_rows, E0, E1, E), other=0.0)
    return x0, x1


@triton.jit
def store_pair(
    ptr, o_rows, stride, m_rows, x0, x1, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr
):
    dtype = ptr.dtype.element_ty
    p_rows = ptr + o_rows[:, None] * stride
    p_0 = p_rows + tl.arange(0, E0)[None, :]
    tl.store(p_0, x0.to(dtype), mask=_mask(m_rows, 0, E0, E))
    if E1 > 0:
        o_e = E0 + tl.arange(0, E1)
        tl.store(p_rows + o_e[None, :], x1.to(dtype), mask=_mask(m_rows, E0, E1, E))


@triton.jit
def zero_pair(ROWS: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    x0 = tl.zeros((ROWS, E0), tl.float32)
    x1 = x0
    if E1 > 0:
        x1 = tl.zeros((ROWS, E1), tl.float32)
    return x0, x1


@triton.jit
def dot_over_width(a0, a1, b0, b1, E1: tl.constexpr):
    """a b^T, summed over the head's columns."""
    x = tl.dot(a0, b0.T, input_precision="ieee")
    if E1 > 0:
        x = tl.dot(a1, b1.T, x, input_precision="ieee")
    return x


@triton.jit
def dot_over_rows(p, x0, x1, acc0, acc1, E1: tl.constexpr):
    """acc + p x."""
    acc0 = tl.dot(p, x0, acc0, input_precision="ieee")
    acc1 = acc1 if E1 == 0 else tl.dot(p, x1, acc1, input_precision="ieee")
    return acc0, acc1


@triton.jit
def bounds(cu_ptr, used_ptr, i_b):
    """First row of sequence `i_b` (int64) and how many of its rows count (int32)."""
    first = tl.load(cu_ptr + i_b)
    n = tl.load(cu_ptr + i_b + 1) - first
    if used_ptr is not None:
        n = tl.maximum(tl.minimum(n, tl.load(used_ptr + i_b)), 0)
    return first.to(tl.int64), n


@triton.jit
def read_ahead(lookahead_ptr, i_b):
    """How many later tokens a token of causal sequence `i_b` reads."""
    ahead = 0
    if lookahead_ptr is not None:
        ahead = tl.load(lookahead_ptr + i_b)
    return ahead


@triton.jit
def fill_past(ptr, start, stop, value, BLOCK: tl.constexpr):
    """`value` into this program's share of elements [start, stop), which mostly are none."""
    o = tl.arange(0, BLOCK)
    step = tl.num_programs(0) * BLOCK
    for i in range(start + tl.program_id(0) * BLOCK, stop, step):
        filled = tl.full((BLOCK,), value, ptr.dtype.element_ty)
        tl.store(ptr + i + o, filled, mask=o < stop - i)
