"""Triton backend: one product whose prologue widens bytes and whose epilogue adds what is added.

The backward is `_chunked`'s: its library product is its cost.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.tile_product import capability_of


class Config(NamedTuple):
    BT: int  # tokens of a tile
    BD: int  # columns of a tile
    BK: int  # depth of one step
    num_warps: int
    num_stages: int


# The fastest of five on an H100. Elsewhere by compile reports: no spills, two blocks an SM.
HOPPER = Config(BT=128, BD=256, BK=64, num_warps=8, num_stages=3)
HALF = Config(BT=128, BD=128, BK=64, num_warps=8, num_stages=3)
FLOAT32 = Config(BT=64, BD=64, BK=32, num_warps=4, num_stages=2)
GROUP = 8  # tiles of rows that share the weight's columns while those are in L2


def config(
    dtype: torch.dtype, capability: tuple[int, int], is_bytes: bool, is_masked: bool
) -> Config:
    if dtype is torch.float32:
        return FLOAT32
    # Float patches, or a mask, take registers that the wider tile does not have.
    return HOPPER if capability[0] == 9 and is_bytes and not is_masked else HALF


def unsupported(patches: Tensor, weight: Tensor) -> str | None:
    if patches.dtype not in (torch.uint8, torch.float32, torch.float16, torch.bfloat16):
        return f"needs uint8 or float patches of at most 32 bits, got {patches.dtype}"
    if weight.dtype is torch.float64:
        return "needs weights of at most 32 bits, got torch.float64"
    return None


@triton.jit
def _fwd_kernel(
    patches_ptr,  # (T, K)
    weight_ptr,  # (D, K)
    bias_ptr,  # (D,)
    posemb_ptr,  # (T, D)
    mask_ptr,  # (T,) uint8
    mask_token_ptr,  # (D,)
    out_ptr,  # (T, D)
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_t, num_d = tl.cdiv(T, BT), tl.cdiv(D, BD)
    i_tile = tl.program_id(0)
    first_t = i_tile // (GROUP * num_d) * GROUP
    group = tl.minimum(num_t - first_t, GROUP)
    i_t = first_t + i_tile % (GROUP * num_d) % group
    i_d = i_tile % (GROUP * num_d) // group

    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)
    o_d = i_d * BD + tl.arange(0, BD)
    o_k = tl.arange(0, BK)
    m_t, m_d = o_t < T, o_d < D
    # Rows past the end repeat the last one: loads need no mask, the store drops them.
    p_patches = patches_ptr + tl.minimum(o_t, T - 1)[:, None] * K + o_k[None, :]
    p_weight = weight_ptr + tl.minimum(o_d, D - 1)[:, None] * K + o_k[None, :]
    b_acc = tl.zeros((BT, BD), tl.float32)
    for k in range(0, K, BK):
        if K % BK == 0:
            b_x = tl.load(p_patches + k)
            b_w = tl.load(p_weight + k)
        else:
            m_k = o_k[None, :] < K - k
            b_x = tl.load(p_patches + k, mask=m_k, other=0)
            b_w = tl.load(p_weight + k, mask=m_k, other=0.0)
        if b_x.dtype == tl.uint8:
            # 2 x - 255 is an odd integer below 256: exact in bfloat16.
            b_x = (2 * b_x.to(tl.float32) - 255).to(b_w.dtype)
        else:
            b_x = b_x.to(b_w.dtype)
        b_acc = tl.dot(b_x, b_w.T, b_acc, input_precision="ieee")  # [BT, BD]
    if patches_ptr.dtype.element_ty == tl.uint8:
        b_acc = b_acc * (1.0 / 255)

    b_out = b_acc + tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if mask_ptr is not None:
        b_mask = tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0
        b_token = tl.load(mask_token_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_out = tl.where(b_mask[:, None], b_token[None, :], b_out)
    m_out = m_t[:, None] & m_d[None, :]
    if posemb_ptr is not None:
        p_posemb = posemb_ptr + o_t[:, None] * D + o_d[None, :]
        b_out += tl.load(p_posemb, mask=m_out, other=0.0).to(tl.float32)
    p_out = out_ptr + o_t[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


def fwd(
    patches: Tensor,  # (T, K)
    weight: Tensor,  # (D, K)
    bias: Tensor,  # (D,)
    posemb: Tensor | None,  # (T, D)
    mask: Tensor | None,  # (T,)
    mask_token: Tensor | None,  # (D,)
    dtype: torch.dtype,
) -> Tensor:  # (T, D)
    T, (D, K) = patches.shape[0], weight.shape
    out = patches.new_empty(T, D, dtype=dtype)
    is_bytes = patches.dtype is torch.uint8
    tile = config(dtype, capability_of(patches), is_bytes, mask is not None)
    if dtype is torch.float32 and is_bytes:
        # Triton 3.6 takes TF32 for a float32 product of widened bytes on sm_100.
        patches = patches.to(dtype).mul_(2).sub_(255).mul_(1 / 255)
    _fwd_kernel[(triton.cdiv(T, tile.BT) * triton.cdiv(D, tile.BD),)](
        patches,
        weight.to(dtype),
        bias,
        posemb,
        None if mask is None else mask.view(torch.uint8),
        mask_token,
        out,
        T,
        D=D,
        K=K,
        BT=tile.BT,
        BD=tile.BD,
        BK=tile.BK,
        GROUP=GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
