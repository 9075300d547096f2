"""Backward kernels: each program makes dQ, dK and dV of one sequence and head.

    P = exp(S - lse),    dS = P (dP - delta),    delta = rowsum(dO O) = rowsum(P dP)

One tile: scores are made once, neither lse nor O is read. Several tiles: keys' tiles outside,
queries' tiles inside; dK and dV stay in registers, dQ's float32 partial sums go through a scratch
of the program's own, small enough to stay in L2. Five products, no atomics, a fixed order.
"""

import triton
import triton.language as tl

from .._core.triton_math import LOG2_E
from ._tiles import (
    bounds,
    dot_over_rows,
    dot_over_width,
    fill_past,
    load_pair,
    read_ahead,
    store_pair,
    zero_pair,
)

# They differ from pack to pack: no variant of a kernel for multiples of 16, nor for 1.
SIZES = ("B", "T", "S")


@triton.jit
def _clear_past(dq_ptr, dk_ptr, dv_ptr, end, end_k, T, S, stride_d, IS_ONE: tl.constexpr):
    """Zero gradients of rows behind the last sequence."""
    # One (T, 3, H, E) tensor: a token's row holds all three.
    fill_past(dq_ptr, end.to(tl.int64) * stride_d, T.to(tl.int64) * stride_d, 0.0, 1024)
    if not IS_ONE:
        start, stop = end_k.to(tl.int64) * stride_d, S.to(tl.int64) * stride_d
        fill_past(dk_ptr, start, stop, 0.0, 1024)
        fill_past(dv_ptr, start, stop, 0.0, 1024)


@triton.jit(do_not_specialize=SIZES)
def tile_kernel(
    q_ptr,  # (T, H, E)
    k_ptr,  # (S, H, E)
    v_ptr,  # (S, H, E)
    dout_ptr,  # (T, H, E)
    cu_ptr,  # (B+1,)
    cu_k_ptr,  # (B+1,)
    used_ptr,  # (B,) or None
    used_k_ptr,  # (B,) or None
    lookahead_ptr,  # (B,) or None
    order_ptr,  # (B,)
    dq_ptr,  # (T, H, E)
    dk_ptr,  # (S, H, E)
    dv_ptr,  # (S, H, E)
    B,
    T,
    S,
    stride_q,
    stride_k,
    stride_v,
    stride_d,  # of tokens in all three gradients
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_ONE: tl.constexpr,  # dq, dk, dv are slices of one tensor
):
    i_b, i_h = tl.load(order_ptr + tl.program_id(0) // H), tl.program_id(0) % H
    first, n = bounds(cu_ptr, used_ptr, i_b)
    first_k, n_k = bounds(cu_k_ptr, used_k_ptr, i_b)
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    m_m, m_n = o_m < n, o_n < n_k
    at_q, at_k, at_v = first * stride_q, first_k * stride_k, first_k * stride_v
    b_q0, b_q1 = load_pair(q_ptr + at_q + i_h * E, o_m, stride_q, m_m, E, E0, E1)
    b_k0, b_k1 = load_pair(k_ptr + at_k + i_h * E, o_n, stride_k, m_n, E, E0, E1)
    m_s = m_m[:, None] & m_n[None, :]
    if IS_CAUSAL:
        m_s = m_s & (o_n[None, :] <= o_m[:, None] + read_ahead(lookahead_ptr, i_b))
    b_s = dot_over_width(b_q0, b_q1, b_k0, b_k1, E1)  # [BM, BN]
    b_s = tl.where(m_s, b_s * (scale * LOG2_E), float("-inf"))
    # Finite also in rows without a key, whose sum is 0.
    b_p = tl.exp2(b_s - tl.maximum(tl.max(b_s, 1), -1e30)[:, None])
    b_sum = tl.sum(b_p, 1)
    b_p = b_p / tl.where(b_sum > 0, b_sum, 1.0)[:, None]

    b_v0, b_v1 = load_pair(v_ptr + at_v + i_h * E, o_n, stride_v, m_n, E, E0, E1)
    p_dout = dout_ptr + first * (H * E) + i_h * E
    b_do0, b_do1 = load_pair(p_dout, o_m, H * E, m_m, E, E0, E1)
    b_dp = dot_over_width(b_do0, b_do1, b_v0, b_v1, E1)  # [BM, BN]
    dtype = b_q0.dtype
    b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * scale
    b_p, b_ds = b_p.to(dtype), b_ds.to(dtype)

    at_dk = first_k * stride_d + i_h * E
    b_0, b_1 = zero_pair(BN, E0, E1)
    b_dv0, b_dv1 = dot_over_rows(b_p.T, b_do0, b_do1, b_0, b_1, E1)
    store_pair(dv_ptr + at_dk, o_n, stride_d, m_n, b_dv0, b_dv1, E, E0, E1)
    b_dk0, b_dk1 = dot_over_rows(b_ds.T, b_q0, b_q1, b_0, b_1, E1)
    store_pair(dk_ptr + at_dk, o_n, stride_d, m_n, b_dk0, b_dk1, E, E0, E1)
    b_0, b_1 = zero_pair(BM, E0, E1)
    b_dq0, b_dq1 = dot_over_rows(b_ds, b_k0, b_k1, b_0, b_1, E1)
    p_dq = dq_ptr + first * stride_d + i_h * E
    store_pair(p_dq, o_m, stride_d, m_m, b_dq0, b_dq1, E, E0, E1)

    end, end_k = tl.load(cu_ptr + B), tl.load(cu_k_ptr + B)
    _clear_past(dq_ptr, dk_ptr, dv_ptr, end, end_k, T, S, stride_d, IS_ONE)


@triton.jit
def _delta(
    out_ptr, dout_ptr, delta_ptr, n,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """rowsum(dO O) of one sequence and head."""
    for start in range(0, n, BM):
        o_m = start + tl.arange(0, BM)
        m_m = o_m < n
        b_o0, b_o1 = load_pair(out_ptr, o_m, H * E, m_m, E, E0, E1)
        b_do0, b_do1 = load_pair(dout_ptr, o_m, H * E, m_m, E, E0, E1)
        b_delta = tl.sum(b_o0.to(tl.float32) * b_do0.to(tl.float32), 1)
        if E1 > 0:
            b_delta += tl.sum(b_o1.to(tl.float32) * b_do1.to(tl.float32), 1)
        tl.store(delta_ptr + o_m, b_delta, mask=m_m)


@triton.jit(do_not_specialize=SIZES)
def loop_kernel(
    q_ptr,  # (T, H, E)
    k_ptr,  # (S, H, E)
    v_ptr,  # (S, H, E)
    dout_ptr,  # (T, H, E)
    out_ptr,  # (T, H, E)
    lse_ptr,  # (H, T)
    cu_ptr,  # (B+1,)
    cu_k_ptr,  # (B+1,)
    used_ptr,  # (B,) or None
    used_k_ptr,  # (B,) or None
    lookahead_ptr,  # (B,) or None
    order_ptr,  # (B,)
    dq_ptr,  # (T, H, E)
    dk_ptr,  # (S, H, E)
    dv_ptr,  # (S, H, E)
    delta_ptr,  # (H, T), written
    partial_ptr,  # (num_programs, max_seqlen, E0 + E1), written
    B,
    T,
    S,
    max_seqlen,
    stride_q,
    stride_k,
    stride_v,
    stride_d,  # of tokens in all three gradients
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_ONE: tl.constexpr,
):
    o_n = tl.arange(0, BN)
    W: tl.constexpr = E0 + E1
    partial_ptr += tl.program_id(0).to(tl.int64) * max_seqlen * W
    for item in range(tl.program_id(0), B * H, tl.num_programs(0)):
        i_b, i_h = tl.load(order_ptr + item // H), item % H
        first, n = bounds(cu_ptr, used_ptr, i_b)
        first_k, n_k = bounds(cu_k_ptr, used_k_ptr, i_b)
        ahead = read_ahead(lookahead_ptr, i_b)
        p_q = q_ptr + first * stride_q + i_h * E
        p_k = k_ptr + first_k * stride_k + i_h * E
        p_v = v_ptr + first_k * stride_v + i_h * E
        p_do = dout_ptr + first * (H * E) + i_h * E
        p_lse = lse_ptr + T.to(tl.int64) * i_h + first
        p_delta = delta_ptr + T.to(tl.int64) * i_h + first
        _delta(out_ptr + first * (H * E) + i_h * E, p_do, p_delta, n, H, E, E0, E1, BM)
        tl.debug_barrier()
        # Without keys one empty tile still writes dQ = 0.
        for start in range(0, tl.maximum(n_k, 1), BN):
            o_k = start + o_n
            m_n = o_k < n_k
            b_k0, b_k1 = load_pair(p_k, o_k, stride_k, m_n, E, E0, E1)
            b_v0, b_v1 = load_pair(p_v, o_k, stride_v, m_n, E, E0, E1)
            b_dk0, b_dk1 = zero_pair(BN, E0, E1)
            b_dv0, b_dv1 = zero_pair(BN, E0, E1)
            begin = tl.maximum(start - ahead, 0) // BM * BM if IS_CAUSAL else 0
            for row in range(begin, n, BM):
                o_m = row + tl.arange(0, BM)
                m_m = o_m < n
                b_q0, b_q1 = load_pair(p_q, o_m, stride_q, m_m, E, E0, E1)
                b_do0, b_do1 = load_pair(p_do, o_m, H * E, m_m, E, E0, E1)
                b_lse = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2_E
                b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
                m_s = m_n[:, None] & m_m[None, :]
                if IS_CAUSAL:
                    m_s = m_s & (o_k[:, None] <= o_m[None, :] + ahead)
                b_s = dot_over_width(b_k0, b_k1, b_q0, b_q1, E1)  # [BN, BM]
                b_p = tl.where(m_s, tl.exp2(b_s * (scale * LOG2_E) - b_lse[None, :]), 0.0)
                b_dp = dot_over_width(b_v0, b_v1, b_do0, b_do1, E1)  # [BN, BM]
                b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q0.dtype)
                b_dv0, b_dv1 = dot_over_rows(b_p.to(b_q0.dtype), b_do0, b_do1, b_dv0, b_dv1, E1)
                b_dk0, b_dk1 = dot_over_rows(b_ds, b_q0, b_q1, b_dk0, b_dk1, E1)
                b_0, b_1 = zero_pair(BM, E0, E1)
                b_dq0, b_dq1 = dot_over_rows(b_ds.T, b_k0, b_k1, b_0, b_1, E1)
                # Masks, not branches: Triton 3.6 cannot pipeline a product used inside a branch.
                # The scratch has whole tiles; masks of its rows would cost registers.
                stop = tl.minimum(n_k, row + BM + ahead) if IS_CAUSAL else n_k
                m_old, m_new = (o_m >= 0) & (start > 0), (o_m >= 0) & (start + BN < stop)
                b_old0, b_old1 = load_pair(partial_ptr, o_m, W, m_old, W, E0, E1)
                b_dq0 += b_old0
                b_dq1 = b_dq0 if E1 == 0 else b_dq1 + b_old1
                store_pair(partial_ptr, o_m, W, m_new, b_dq0, b_dq1, W, E0, E1)
                b_dq0 = b_dq0 * scale
                b_dq1 = b_dq0 if E1 == 0 else b_dq1 * scale
                p_dq = dq_ptr + first * stride_d + i_h * E
                m_last = m_m & (start + BN >= stop)
                store_pair(p_dq, o_m, stride_d, m_last, b_dq0, b_dq1, E, E0, E1)
            at = first_k * stride_d + i_h * E
            b_dk0 = b_dk0 * scale
            b_dk1 = b_dk0 if E1 == 0 else b_dk1 * scale
            store_pair(dk_ptr + at, o_k, stride_d, m_n, b_dk0, b_dk1, E, E0, E1)
            store_pair(dv_ptr + at, o_k, stride_d, m_n, b_dv0, b_dv1, E, E0, E1)
            tl.debug_barrier()

    end, end_k = tl.load(cu_ptr + B), tl.load(cu_k_ptr + B)
    _clear_past(dq_ptr, dk_ptr, dv_ptr, end, end_k, T, S, stride_d, IS_ONE)
