"""Triton backend: a GEMM over tiles of logits whose epilogue is the loss, then two library GEMMs.

Logits stay float32 in registers. What reaches memory is G = dl/dz in the inputs' dtype, for one
chunk of rows at a time, and three sums per tile, which are added up in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, unit_scale
from .._core.triton_math import softplus_sigmoid

# G's buffer; 4096 rows at M = 64k. Longer chunks mean fewer passes over the float32 dtxt.
MAX_ELEMENTS = 1 << 28


class Config(NamedTuple):
    BB: int  # rows of a tile
    BM: int  # columns of a tile; the epilogue takes them in two halves
    BD: int  # depth of one step of the product
    num_warps: int
    num_stages: int


# The largest tiles whose epilogue stays in registers, as compile reports say (not yet timed).
# Hopper and data-centre Blackwell: 128 x 256 spills 640 bytes a thread there.
WIDE = Config(BB=128, BM=128, BD=64, num_warps=8, num_stages=3)
# Ampere, Ada, consumer Blackwell: their products hold operands in registers; WIDE spills 24 bytes.
NARROW = Config(BB=128, BM=64, BD=64, num_warps=4, num_stages=3)
# Float32 products without TF32 run on the ordinary cores.
FLOAT32 = Config(BB=64, BM=64, BD=32, num_warps=4, num_stages=2)
GROUP = 8  # tiles of rows that share their columns while those are in L2


def config(dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    if dtype is torch.float32:
        return FLOAT32
    return WIDE if capability[0] in (9, 10) else NARROW


def _config_for(x: Tensor) -> Config:
    return config(x.dtype, torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0))


@triton.jit
def _raw_tile(
    img_ptr,
    txt_ptr,
    o_b,
    o_m,
    stride_img,
    stride_txt,
    D: tl.constexpr,
    BB: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    p_img = img_ptr + o_b.to(tl.int64)[:, None] * stride_img + o_d[None, :]
    p_txt = txt_ptr + o_m.to(tl.int64)[:, None] * stride_txt + o_d[None, :]
    b_raw = tl.zeros((BB, BM), tl.float32)
    for d in range(0, D, BD):
        if D % BD == 0:
            b_img = tl.load(p_img + d)  # [BB, BD]
            b_txt = tl.load(p_txt + d)  # [BM, BD]
        else:
            m_d = o_d[None, :] < D - d
            b_img = tl.load(p_img + d, mask=m_d, other=0.0)
            b_txt = tl.load(p_txt + d, mask=m_d, other=0.0)
        # "ieee" keeps float32 inputs from TF32; half-precision products are exact either way.
        b_raw = tl.dot(b_img, b_txt.T, b_raw, input_precision="ieee")
    return b_raw  # [BB, BM]


@triton.jit
def _epilogue(
    b_raw,  # [BB, BN], raw dot products of the columns o_m
    o_b,
    o_m,
    first_row,
    B,
    M,
    scale,
    bias,
    img_ids_ptr,
    txt_ids_ptr,
    img_weight_ptr,
    txt_weight_ptr,
):
    """Weighted losses and G of one block of pairs; 0 for pairs outside (B, M)."""
    b_z = b_raw * scale + bias
    if img_ids_ptr is None:
        m_pos = (first_row + o_b)[:, None] == o_m[None, :]
    else:
        b_img_ids = tl.load(img_ids_ptr + o_b, mask=o_b < B, other=0)
        b_txt_ids = tl.load(txt_ids_ptr + o_m, mask=o_m < M, other=0)
        m_pos = b_img_ids[:, None] == b_txt_ids[None, :]
    b_loss, b_p = softplus_sigmoid(tl.where(m_pos, -b_z, b_z))
    b_g = tl.where(m_pos, -b_p, b_p)

    # A weight of 0 outside the matrix does the masking.
    b_row = (o_b < B).to(tl.float32)
    b_column = (o_m < M).to(tl.float32)
    if img_weight_ptr is not None:
        b_row = tl.load(img_weight_ptr + o_b, mask=o_b < B, other=0.0)
    if txt_weight_ptr is not None:
        b_column = tl.load(txt_weight_ptr + o_m, mask=o_m < M, other=0.0)
    b_weight = b_row[:, None] * b_column[None, :]
    return b_loss * b_weight, b_g * b_weight


@triton.jit
def _tile_kernel(
    img_ptr,
    txt_ptr,
    log_scale_ptr,
    bias_ptr,
    img_ids_ptr,
    txt_ids_ptr,
    img_weight_ptr,
    txt_weight_ptr,
    g_ptr,
    totals_ptr,
    rows_ptr,
    columns_ptr,
    B,
    M,
    first_row,
    stride_img,
    stride_txt,
    stride_g,
    D: tl.constexpr,
    BB: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    LIFT: tl.constexpr,
):
    # Neighbouring programs share rows and columns, so that both are read from L2.
    num_b, num_m = tl.cdiv(B, BB), tl.cdiv(M, BM)
    i_tile = tl.program_id(0)
    first_b = i_tile // (GROUP * num_m) * GROUP
    group = tl.minimum(num_b - first_b, GROUP)
    i_b = first_b + i_tile % (GROUP * num_m) % group
    i_m = i_tile % (GROUP * num_m) // group

    o_b = i_b * BB + tl.arange(0, BB)
    o_m = i_m * BM + tl.arange(0, BM)
    # Rows past the end repeat the last one: loads need no mask, the epilogue drops them.
    b_raw = _raw_tile(
        img_ptr,
        txt_ptr,
        tl.minimum(o_b, B - 1),
        tl.minimum(o_m, M - 1),
        stride_img,
        stride_txt,
        D,
        BB,
        BM,
        BD,
    )
    scale, bias = tl.exp(tl.load(log_scale_ptr)), tl.load(bias_ptr)

    # The epilogue takes one half of the columns after the other: a whole tile spills registers.
    b_halves = b_raw.reshape(BB, 2, BM // 2).permute(0, 2, 1).split()
    loss = 0.0
    graw = 0.0
    gsum = 0.0
    b_rows = tl.zeros((BB,), tl.float32)
    for half in tl.static_range(2):
        o_n = i_m * BM + half * (BM // 2) + tl.arange(0, BM // 2)
        b_half = b_halves[half]
        b_loss, b_g = _epilogue(
            b_half,
            o_b,
            o_n,
            first_row,
            B,
            M,
            scale,
            bias,
            img_ids_ptr,
            txt_ids_ptr,
            img_weight_ptr,
            txt_weight_ptr,
        )
        if rows_ptr is not None:
            b_rows += tl.sum(b_loss, 1)
            p_columns = columns_ptr + i_b.to(tl.int64) * M + o_n
            tl.store(p_columns, tl.sum(b_loss, 0), mask=o_n < M)
        else:
            loss += tl.sum(b_loss)
            graw += tl.sum(b_g * b_half)
            gsum += tl.sum(b_g)
        if g_ptr is not None:
            # G is padded to whole tiles, so its stores need no mask.
            p_g = g_ptr + o_b.to(tl.int64)[:, None] * stride_g + o_n[None, :]
            tl.store(p_g, (b_g * LIFT).to(g_ptr.dtype.element_ty))

    if rows_ptr is not None:
        tl.store(rows_ptr + i_m.to(tl.int64) * B + o_b, b_rows, mask=o_b < B)
    else:
        p_totals = totals_ptr + (i_b.to(tl.int64) * num_m + i_m) * 3
        tl.store(p_totals, loss)
        tl.store(p_totals + 1, graw)
        tl.store(p_totals + 2, gsum)


def unsupported(img: Tensor, txt: Tensor) -> str | None:
    if img.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {img.dtype}"
    if img.stride(1) != 1 or txt.stride(1) != 1:
        return f"needs rows of unit stride, got strides {img.stride()}, {txt.stride()}"
    return None


def _launch(
    img: Tensor,  # (c, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (c,)
    txt_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (c,)
    txt_weight: Tensor | None,  # (M,)
    first_row: int,
    *,
    g: Tensor | None = None,  # (c, M) in whole tiles
    totals: Tensor | None = None,  # (tiles, 3)
    rows: Tensor | None = None,  # (column tiles, c)
    columns: Tensor | None = None,  # (row tiles, M)
) -> None:
    (B, D), M = img.shape, txt.shape[0]
    tile = _config_for(img)
    _tile_kernel[(triton.cdiv(B, tile.BB) * triton.cdiv(M, tile.BM),)](
        img,
        txt,
        log_scale,
        bias,
        img_ids,
        txt_ids,
        img_weight,
        txt_weight,
        g,
        totals,
        rows,
        columns,
        B,
        M,
        first_row,
        img.stride(0),
        txt.stride(0),
        0 if g is None else g.stride(0),
        D=D,
        BB=tile.BB,
        BM=tile.BM,
        BD=tile.BD,
        GROUP=GROUP,
        LIFT=unit_scale(img.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _rows(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if x is None else x[start:stop]


def fwd(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,) float32
    txt_weight: Tensor | None,  # (M,) float32
    needs_dimg: bool,
    needs_dtxt: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (3,), (B, D) or (0, D), (M, D) or (0, D)
    """Sums of loss, G * raw and G over all pairs, then G @ txt and G.T @ img, all float32."""
    (B, D), M = img.shape, txt.shape[0]
    tile = _config_for(img)
    log_scale, bias = log_scale.float(), bias.float()
    dimg = img.new_empty((B if needs_dimg else 0, D), dtype=torch.float32)
    dtxt = txt.new_zeros((M if needs_dtxt else 0, D), dtype=torch.float32)
    chunks = list(row_chunks(B, M, MAX_ELEMENTS, multiple=tile.BB))
    g = None
    if needs_dimg or needs_dtxt:
        most = triton.cdiv(chunks[0][1], tile.BB) * tile.BB
        g = img.new_empty(most, triton.cdiv(M, tile.BM) * tile.BM)
    totals = []
    for start, stop in chunks:
        x = img[start:stop]
        tiles = triton.cdiv(stop - start, tile.BB) * triton.cdiv(M, tile.BM)
        part = img.new_empty((tiles, 3), dtype=torch.float32)
        ids, weight = _rows(img_ids, start, stop), _rows(img_weight, start, stop)
        _launch(x, txt, log_scale, bias, ids, txt_ids, weight, txt_weight, start, g=g, totals=part)
        totals.append(part.sum(0, dtype=torch.float64))
        if needs_dimg:
            mm_f32(g[: stop - start, :M], txt, out=dimg[start:stop])
        if needs_dtxt:
            addmm_f32_(dtxt, g[: stop - start, :M].T, x)
    if (lift := unit_scale(img.dtype)) != 1:
        dimg.mul_(1 / lift), dtxt.mul_(1 / lift)
    return torch.stack(totals).sum(0).float(), dimg, dtxt


def sums(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,) float32
    txt_weight: Tensor | None,  # (M,) float32
) -> tuple[Tensor, Tensor]:  # (B,), (M,) float32
    """The weighted losses summed over each row and each column."""
    B, M = img.shape[0], txt.shape[0]
    tile = _config_for(img)
    log_scale, bias = log_scale.float(), bias.float()
    rows = img.new_empty(B, dtype=torch.float32)
    columns = txt.new_zeros(M, dtype=torch.float32)
    for start, stop in row_chunks(B, M, MAX_ELEMENTS, multiple=tile.BB):
        n = stop - start
        row_part = rows.new_empty(triton.cdiv(M, tile.BM), n)
        column_part = rows.new_empty(triton.cdiv(n, tile.BB), M)
        ids, weight = _rows(img_ids, start, stop), _rows(img_weight, start, stop)
        _launch(
            img[start:stop],
            txt,
            log_scale,
            bias,
            ids,
            txt_ids,
            weight,
            txt_weight,
            start,
            rows=row_part,
            columns=column_part,
        )
        rows[start:stop] = row_part.sum(0)
        columns += column_part.sum(0)
    return rows, columns
