"""Triton backend: scores are one library product; the softmax and both sums over tokens are here.

Forward: a program makes one slice of D of one sequence's mean tokens, for all heads. Backward: a
program makes one tile of tokens. Heads are padded to 16, the least a tensor core takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.matmul import mm_f32

BN = 64  # tokens of a tile
BD = 128  # columns of a slice
NUM_WARPS = 4
NUM_STAGES = 2


def unsupported(x: Tensor, u: Tensor, cu_seqlens: Tensor) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {x.dtype}"
    if u.shape[0] > 64:
        return f"needs at most 64 heads, got {u.shape[0]}"
    return None


@triton.jit
def _fwd_kernel(
    x_ptr,  # (T, D)
    s_ptr,  # (T, H)
    cu_ptr,  # (B+1,)
    m_ptr,  # (B, H, D)
    lse_ptr,  # (B, H)
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(0)
    first = tl.load(cu_ptr + i_b).to(tl.int64)
    n = (tl.load(cu_ptr + i_b + 1) - first).to(tl.int32)
    o_h, o_n = tl.arange(0, BH), tl.arange(0, BN)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_h, m_d = o_h < H, o_d < D

    p_s = s_ptr + (first + o_n)[None, :] * H + o_h[:, None]
    p_x = x_ptr + (first + o_n)[:, None] * D + o_d[None, :]
    b_max = tl.full((BH,), -1e30, tl.float32)
    b_sum = tl.zeros((BH,), tl.float32)
    b_m = tl.zeros((BH, BD), tl.float32)
    for i in range(0, n, BN):
        m_n = o_n < n - i
        b_s = tl.load(p_s + i * H, mask=m_h[:, None] & m_n[None, :], other=0.0)
        b_s = tl.where(m_n[None, :], b_s, -1e30)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_new[:, None])
        b_old = tl.exp(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        # Rows of the next sequence are not read: 0 * inf would leak between images.
        b_x = tl.load(p_x + i * D, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_m = b_m * b_old[:, None]
        b_m = tl.dot(b_p.to(b_x.dtype), b_x, b_m, input_precision="ieee")  # [BH, BD]
        b_max = b_new
    b_sum = tl.where(b_sum > 0, b_sum, 1.0)
    p_m = m_ptr + (i_b.to(tl.int64) * H + o_h)[:, None] * D + o_d[None, :]
    tl.store(p_m, b_m / b_sum[:, None], mask=m_h[:, None] & m_d[None, :])
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + i_b * H + o_h, b_max + tl.log(b_sum), mask=m_h)


@triton.jit
def _bwd_kernel(
    x_ptr,  # (T, D)
    u_ptr,  # (H, D)
    s_ptr,  # (T, H)
    dm_ptr,  # (B, H, D)
    lse_ptr,  # (B, H)
    delta_ptr,  # (B, H)
    cu_ptr,  # (B+1,)
    dx_ptr,  # (T, D)
    ds_ptr,  # (T, H)
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(1)
    start = tl.program_id(0) * BN
    first = tl.load(cu_ptr + i_b).to(tl.int64)
    n = (tl.load(cu_ptr + i_b + 1) - first).to(tl.int32)
    if start < n:
        o_n = start + tl.arange(0, BN)
        o_h, o_d = tl.arange(0, BH), tl.arange(0, BD)
        m_n, m_h = o_n < n, o_h < H
        o_x = (first + o_n)[:, None] * D
        o_m = (i_b.to(tl.int64) * H + o_h)[:, None] * D
        b_dp = tl.zeros((BN, BH), tl.float32)
        for d in range(0, D, BD):
            m_d = o_d < D - d
            p_x = x_ptr + o_x + d + o_d[None, :]
            b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0)
            p_dm = dm_ptr + o_m + d + o_d[None, :]
            b_dm = tl.load(p_dm, mask=m_h[:, None] & m_d[None, :], other=0.0)
            b_dp = tl.dot(b_x, b_dm.to(b_x.dtype).T, b_dp, input_precision="ieee")  # [BN, BH]

        m_nh = m_n[:, None] & m_h[None, :]
        p_s = (first + o_n)[:, None] * H + o_h[None, :]
        b_lse = tl.load(lse_ptr + i_b * H + o_h, mask=m_h, other=0.0)
        b_delta = tl.load(delta_ptr + i_b * H + o_h, mask=m_h, other=0.0)
        b_s = tl.load(s_ptr + p_s, mask=m_nh, other=0.0)
        b_p = tl.where(m_nh, tl.exp(b_s - b_lse[None, :]), 0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        tl.store(ds_ptr + p_s, b_ds.to(ds_ptr.dtype.element_ty), mask=m_nh)
        for d in range(0, D, BD):
            m_d = o_d < D - d
            m_hd = m_h[:, None] & m_d[None, :]
            b_dm = tl.load(dm_ptr + o_m + d + o_d[None, :], mask=m_hd, other=0.0)
            b_u = tl.load(u_ptr + o_h[:, None] * D + d + o_d[None, :], mask=m_hd, other=0.0)
            dtype = dx_ptr.dtype.element_ty
            b_dx = tl.dot(b_p.to(dtype), b_dm.to(dtype), input_precision="ieee")  # [BN, BD]
            b_dx = tl.dot(b_ds.to(dtype), b_u.to(dtype), b_dx, input_precision="ieee")
            p_dx = dx_ptr + o_x + d + o_d[None, :]
            tl.store(p_dx, b_dx.to(dtype), mask=m_n[:, None] & m_d[None, :])


def _sizes(u: Tensor) -> dict[str, int]:
    H, D = u.shape
    return {"H": H, "D": D, "BH": max(16, triton.next_power_of_2(H)), "BN": BN, "BD": BD}


def fwd(
    x: Tensor,  # (T, D)
    u: Tensor,  # (H, D)
    cu_seqlens: Tensor,  # (B+1,)
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, H, D), (T, H), (B, H)
    B, (H, D) = cu_seqlens.shape[0] - 1, u.shape
    s = mm_f32(x, u.to(x.dtype).T)
    m, lse = s.new_empty(B, H, D), s.new_empty(B, H)
    _fwd_kernel[(B, triton.cdiv(D, BD))](
        x, s, cu_seqlens, m, lse, **_sizes(u), num_warps=NUM_WARPS, num_stages=NUM_STAGES
    )
    return m, s, lse


def bwd(
    dm: Tensor,  # (B, H, D)
    x: Tensor,  # (T, D)
    u: Tensor,  # (H, D)
    m: Tensor,  # (B, H, D)
    s: Tensor,  # (T, H)
    lse: Tensor,  # (B, H)
    cu_seqlens: Tensor,  # (B+1,)
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:  # (T, D), (H, D)
    # Rows past the last sequence, which static shapes may have, get no gradient.
    dx, ds = torch.zeros_like(x), s.new_zeros(s.shape, dtype=x.dtype)
    delta = (m * dm).sum(-1)
    _bwd_kernel[(triton.cdiv(max_seqlen, BN), cu_seqlens.shape[0] - 1)](
        x,
        u,
        s,
        dm,
        lse,
        delta,
        cu_seqlens,
        dx,
        ds,
        **_sizes(u),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return dx, mm_f32(ds.T, x)
