"""The Triton kernel of the scaled-exponential design: logits in registers, exponentials out."""

import triton
import triton.language as tl

from .._core.tile_product import product_tile, split_columns, tile_at
from .._core.triton_math import LOG2_E


@triton.jit
def capped(z, softcap):
    """softcap tanh(z / softcap), and its slope 1 - tanh^2, without 1 - 1 where tanh is near 1."""
    e = tl.exp2(-2.0 * LOG2_E * tl.abs(z) / softcap)
    r = 1.0 / (1.0 + e)
    t = (1.0 - e) * r
    return softcap * tl.where(z < 0, -t, t), 4.0 * e * r * r


@triton.jit
def _logits(b_z, o_v, m_v, bias_ptr, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits of raw products b_z [BT, BN], and the cap's slope."""
    if bias_ptr is not None:
        b_z += tl.load(bias_ptr + o_v, mask=m_v, other=0.0)[None, :]
    b_slope = 1.0
    if HAS_SOFTCAP:
        b_z, b_slope = capped(b_z, softcap)
    return b_z, b_slope


# So that no number of tokens compiles anything, nor an odd start of a chunk.
@triton.jit(do_not_specialize=["T", "V", "target_ptr"])
def _exp_tile_kernel(
    x,  # pointer, or tensor descriptor of blocks [BT, BD] if HAS_TMA
    weight,  # likewise, [BV, BD]
    bias_ptr,
    target_ptr,  # None: neither sums nor maxes are wanted
    offset_ptr,  # m in units of ln 2; None: no exponentials are wanted
    flags_ptr,  # which tiles of rows to do, and last how many; None: all
    e,  # pointer, or tensor descriptor of blocks [BT, BV / PIECES]; None: not wanted
    sums_ptr,  # (column tiles, T) of exp(z - m), without the target's; None: not wanted
    maxes_ptr,  # likewise, of logits
    T,
    V,
    stride_x,
    stride_w,
    stride_e,
    softcap,
    D: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    BN: tl.constexpr = BV // PIECES
    num_tiles = tl.cdiv(T, BT) * tl.cdiv(V, BV)
    if flags_ptr is not None:
        num_tiles = tl.where(tl.load(flags_ptr + tl.cdiv(T, BT)) == 0, 0, num_tiles)
    for i_tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        i_t, i_v = tile_at(i_tile, T, V, BT, BV, GROUP)
        is_wanted = True
        if flags_ptr is not None:
            is_wanted = tl.load(flags_ptr + i_t) != 0
        if is_wanted:
            o_t = i_t * BT + tl.arange(0, BT)
            m_t = o_t < T
            b_z = product_tile(
                x, weight, i_t, i_v, T, V, stride_x, stride_w, D, BT, BV, BD, HAS_TMA
            )
            b_pieces = split_columns(b_z, BT, BV, PIECES)
            b_sums = tl.zeros((BT,), tl.float32)
            b_maxes = tl.full((BT,), -float("inf"), tl.float32)
            b_target = o_t
            if target_ptr is not None:
                b_target = tl.load(target_ptr + o_t, mask=m_t, other=0).to(tl.int32)
            b_offset = b_sums
            if offset_ptr is not None:
                b_offset = tl.load(offset_ptr + o_t, mask=m_t, other=0.0)
            for piece in tl.static_range(PIECES):
                o_v = i_v * BV + piece * BN + tl.arange(0, BN)
                m_v = o_v < V
                b_z, b_slope = _logits(b_pieces[piece], o_v, m_v, bias_ptr, softcap, HAS_SOFTCAP)
                is_other = m_v[None, :] & (o_v[None, :] != b_target[:, None])
                if maxes_ptr is not None:
                    b_other = tl.where(is_other, b_z, -float("inf"))
                    b_maxes = tl.maximum(b_maxes, tl.max(b_other, 1))
                if offset_ptr is not None:
                    b_exp = tl.exp2(b_z * LOG2_E - b_offset[:, None])
                if sums_ptr is not None:
                    b_sums += tl.sum(tl.where(is_other, b_exp, 0.0), 1)
                if e is not None:
                    # E is padded to whole tiles, so its stores need no mask.
                    b_exp *= b_slope
                    if HAS_TMA:
                        e.store([i_t * BT, i_v * BV + piece * BN], b_exp.to(e.dtype))
                    else:
                        p_e = e + o_t.to(tl.int64)[:, None] * stride_e + o_v[None, :]
                        tl.store(p_e, b_exp.to(e.dtype.element_ty))

            if sums_ptr is not None:
                tl.store(sums_ptr + i_v.to(tl.int64) * T + o_t, b_sums, mask=m_t)
            if maxes_ptr is not None:
                tl.store(maxes_ptr + i_v.to(tl.int64) * T + o_t, b_maxes, mask=m_t)
