"""Triton backend.

Forward: a program makes one tile of queries of one sequence and head. Backward: one program makes
a whole sequence and head, so dQ needs neither atomics nor a second pass over the scores; see
README.md. Heads are the fastest program index: their rows share sectors of memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.triton_math import LN_2, LOG2_E
from ._backward_triton import loop_kernel, tile_kernel
from ._tiles import (
    bounds,
    dot_over_rows,
    dot_over_width,
    fill_past,
    load_pair,
    read_ahead,
    split_width,
    store_pair,
    zero_pair,
)
from .plan import Layout, tile_rows

MAX_WIDTH = 128


class Config(NamedTuple):
    BM: int  # queries of a tile
    BN: int  # keys of a tile
    num_warps: int
    num_stages: int
    programs: int = 1  # of the backward's loop, a multiprocessor


def unsupported(q: Tensor, layout: Layout, causal: bool) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {q.dtype}"
    if q.shape[2] % 8 or q.shape[2] > MAX_WIDTH:
        return f"needs a head width divisible by 8, up to {MAX_WIDTH}; got {q.shape[2]}"
    return None


@triton.jit(do_not_specialize=("B", "T"))
def _fwd_kernel(
    q_ptr,  # (T, H, E)
    k_ptr,  # (S, H, E)
    v_ptr,  # (S, H, E)
    cu_ptr,  # (B+1,)
    cu_k_ptr,  # (B+1,)
    used_ptr,  # (B,) or None
    used_k_ptr,  # (B,) or None
    lookahead_ptr,  # (B,) or None
    tiles_ptr,  # (num_tiles, 2)
    out_ptr,  # (T, H, E)
    lse_ptr,  # (H, T)
    B,
    T,
    stride_q,
    stride_k,
    stride_v,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,  # tiles here of one of the plan
    IS_CAUSAL: tl.constexpr,
    IS_ONE_TILE: tl.constexpr,  # no sequence has more than BN keys
):
    i_tile, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    p_tile = tiles_ptr + 2 * (i_tile // SPLIT)
    i_b = tl.load(p_tile)
    row = (tl.load(p_tile + 1) * SPLIT + i_tile % SPLIT) * BM
    first, n = bounds(cu_ptr, used_ptr, tl.maximum(i_b, 0))
    if (i_b >= 0) & (row < n):
        first_k, n_k = bounds(cu_k_ptr, used_k_ptr, i_b)
        o_m = row + tl.arange(0, BM)
        o_n = tl.arange(0, BN)
        m_m = o_m < n
        b_q0, b_q1 = load_pair(q_ptr + first * stride_q + i_h * E, o_m, stride_q, m_m, E, E0, E1)
        k_ptr += first_k * stride_k + i_h * E
        v_ptr += first_k * stride_v + i_h * E
        # Finite, so that exp2(-inf - b_max) is 0 in rows that have seen no key.
        b_max = tl.full((BM,), -1e30, tl.float32)
        b_sum = tl.zeros((BM,), tl.float32)
        b_out0, b_out1 = zero_pair(BM, E0, E1)
        # Scores in units of ln 2: exp2 is one instruction.
        unit = scale * LOG2_E
        stop = n_k
        if IS_CAUSAL:
            ahead = read_ahead(lookahead_ptr, i_b)
            stop = tl.minimum(n_k, tl.max(o_m) + 1 + ahead)
        if IS_ONE_TILE:
            stop = tl.minimum(stop, 1)
        for start in range(0, stop, BN):
            o_k = start + o_n
            m_n = o_k < n_k
            b_k0, b_k1 = load_pair(k_ptr, o_k, stride_k, m_n, E, E0, E1)
            b_s = dot_over_width(b_q0, b_q1, b_k0, b_k1, E1)  # [BM, BN]
            m_s = m_n[None, :]
            if IS_CAUSAL:
                m_s = m_s & (o_k[None, :] <= o_m[:, None] + ahead)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * unit)
            b_p = tl.exp2(b_s * unit - b_new[:, None])
            if not IS_ONE_TILE:
                b_old = tl.exp2(b_max - b_new)
                b_sum = b_sum * b_old
                b_out0 = b_out0 * b_old[:, None]
                if E1 > 0:
                    b_out1 = b_out1 * b_old[:, None]
            b_sum += tl.sum(b_p, 1)
            b_v0, b_v1 = load_pair(v_ptr, o_k, stride_v, m_n, E, E0, E1)
            b_out0, b_out1 = dot_over_rows(
                b_p.to(b_v0.dtype), b_v0, b_v1, b_out0, b_out1, E1
            )  # [BM, E]
            b_max = b_new

        has_key = b_sum > 0
        b_sum = tl.where(has_key, b_sum, 1.0)
        b_lse = tl.where(has_key, (b_max + tl.log2(b_sum)) * LN_2, float("-inf"))
        p_out = out_ptr + first * (H * E) + i_h * E
        b_out0, b_out1 = b_out0 / b_sum[:, None], b_out1 / b_sum[:, None]
        store_pair(p_out, o_m, H * E, m_m, b_out0, b_out1, E, E0, E1)
        tl.store(lse_ptr + T.to(tl.int64) * i_h + first + o_m, b_lse, mask=m_m)

    end = tl.load(cu_ptr + B).to(tl.int64)
    fill_past(out_ptr, end * (H * E), T.to(tl.int64) * (H * E), 0.0, 1024)


def sizes(E: int) -> dict[str, int]:
    E0, E1 = split_width(E)
    return {"E": E, "E0": E0, "E1": E1}


def fwd_config(
    dtype: torch.dtype, E: int, max_seqlen: int, max_seqlen_k: int, generation: int
) -> Config:
    BM, longest = tile_rows(max_seqlen), tile_rows(max_seqlen_k)
    if dtype is torch.float32:  # products without TF32 run on the ordinary cores
        return Config(BM, 16, num_warps=max(BM // 16, 4), num_stages=1)
    if generation == 9 and longest > 64:  # measured on an H100, see README.md
        BM = BM if E <= 64 else min(BM, 64)
        return Config(BM, 64, num_warps=8 if BM == 128 else 4, num_stages=3)
    return Config(BM, min(longest, 64), num_warps=8 if BM == 128 else 4, num_stages=2)


def _rows(x: Tensor) -> Tensor:
    """With one head's columns next to another's, as slices of a packed qkv have them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def fwd(
    qkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E)
    layout: Layout,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    q, k, v = (_rows(x) for x in qkv)
    T, H, E = q.shape
    out = q.new_empty(T, H, E)
    lse = q.new_full((H, T), -torch.inf, dtype=torch.float32)
    if layout.used is not None:
        out.zero_()
    config = fwd_config(q.dtype, E, layout.max_seqlen, layout.max_seqlen_k, _generation(q))
    split = tile_rows(layout.max_seqlen) // config.BM
    _fwd_kernel[(layout.tiles.shape[0] * split * H,)](
        q,
        k,
        v,
        *layout[:6],
        out,
        lse,
        layout.cu_seqlens.shape[0] - 1,
        T,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        scale,
        H=H,
        **sizes(E),
        BM=config.BM,
        BN=config.BN,
        SPLIT=split,
        IS_CAUSAL=causal,
        IS_ONE_TILE=layout.max_seqlen_k <= config.BN,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def _programs(x: Tensor, num_items: int, each: int) -> int:
    """`each` a multiprocessor, which its registers allow: the scratch of all has to fit in L2."""
    if not x.is_cuda:
        return min(num_items, 2)
    count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(num_items, each * count)


def bwd(
    dout: Tensor,  # (T, H, E)
    qkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E)
    out: Tensor,  # (T, H, E)
    lse: Tensor,  # (H, T)
    dqkv: Sequence[Tensor],  # (T, H, E), (S, H, E), (S, H, E): written
    layout: Layout,
    causal: bool,
    scale: float,
) -> None:
    q, k, v = (_rows(x) for x in qkv)
    if layout.used is not None:
        for d in dqkv:
            d.zero_()
    T, H, E = q.shape
    B = layout.cu_seqlens.shape[0] - 1
    generation, longest = _generation(q), (layout.max_seqlen, layout.max_seqlen_k)
    config = bwd_config(q.dtype, E, *longest, generation)
    is_one_tile = max(longest) <= most_in_one_tile(q.dtype, generation)
    inputs = (q, k, v, dout)
    rows_and_items = (B, T, k.shape[0])
    strides = (q.stride(0), k.stride(0), v.stride(0), dqkv[0].stride(0), scale)
    options = sizes(E) | {
        "H": H,
        "BM": config.BM,
        "BN": config.BN,
        "IS_CAUSAL": causal,
        "IS_ONE": dqkv[0].stride(0) != H * E,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    bounds = (*layout[:5], layout.order)
    if is_one_tile:
        tile_kernel[(B * H,)](*inputs, *bounds, *dqkv, *rows_and_items, *strides, **options)
        return
    rows = triton.cdiv(layout.max_seqlen, config.BM) * config.BM
    programs = _programs(q, B * H, config.programs)
    delta = torch.empty_like(lse)
    partial = lse.new_empty(programs, rows, options["E0"] + options["E1"])
    loop_kernel[(programs,)](
        *inputs,
        out,
        lse,
        *bounds,
        *dqkv,
        delta,
        partial,
        *rows_and_items,
        rows,
        *strides,
        **options,
    )


def most_in_one_tile(dtype: torch.dtype, generation: int) -> int:
    """Longest sequence whose backward needs no loop."""
    if dtype is torch.float32:
        return 32
    return 64 if generation == 8 else 128  # Ampere spills at 128


class Loop(NamedTuple):
    """The backward's loop on one generation of GPUs: the largest tiles that spill little."""

    narrow: Config
    wide: Config
    widest_narrow: int  # widest head that `narrow` is for


_LOOPS = {  # by major compute capability
    8: Loop(Config(32, 64, 8, 2), Config(16, 64, 4, 1), 64),
    9: Loop(Config(64, 128, 8, 2), Config(64, 64, 8, 1), 80),
    10: Loop(Config(64, 128, 8, 1), Config(64, 64, 8, 1), 64),
}


# Of cross-attention on Hopper, with at most 128 queries a sequence: measured on an H100.
_FEW_QUERIES = Config(32, 64, 4, 2, programs=2)


def bwd_config(
    dtype: torch.dtype, E: int, max_seqlen: int, max_seqlen_k: int, generation: int
) -> Config:
    BM, BN = tile_rows(max_seqlen), tile_rows(max_seqlen_k)
    if max(max_seqlen, max_seqlen_k) <= most_in_one_tile(dtype, generation):
        return Config(BM, BN, num_warps=8 if max(BM, BN) == 128 else 4, num_stages=1)
    if dtype is torch.float32:
        return Config(16, min(BN, 32), num_warps=8, num_stages=1)
    if generation == 9 and E <= 64 and max_seqlen <= 128:
        return _FEW_QUERIES._replace(BM=min(BM, _FEW_QUERIES.BM))
    loop = _LOOPS[sorted((8, generation, 10))[1]]
    loop = loop.narrow if loop.widest_narrow >= E else loop.wide
    return loop._replace(BM=min(BM, loop.BM), BN=min(BN, loop.BN))


def _generation(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
