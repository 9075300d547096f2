"""Library backend: one product makes logits, a kernel turns them into G, two products use it.

Half-precision inputs are held as float16, bfloat16 ones converted once, and so are their logits:
11 bits where bfloat16 has 8, so that a temperature of 117 does not spoil the sigmoid. Rows are unit
vectors; norms from 1e-3 to 255 lose nothing either, and beyond that a logit overflows to infinity
and the loss or its gradient with it. The kernel overwrites a chunk of logits with G.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, unit_scale
from .._core.triton_math import LOG2_E
from ._pair_terms import as_factors, load_side, pair_terms

# The chunk's elements; 4096 rows at M = 64k. Longer chunks mean fewer passes over float32 dtxt.
MAX_ELEMENTS = 1 << 28
# A program takes ROWS rows of COLUMNS columns; each of its threads 8 columns, 16 bytes of float16.
ROWS, COLUMNS, NUM_WARPS = 32, 1024, 4
ALIGNMENT = 16  # elements to which rows of the chunk are padded, so that all accesses are vectors


@triton.jit(do_not_specialize=["B", "M", "first_row"])  # so that no batch size compiles anything
def _pass_kernel(
    x_ptr,  # (B, stride_x): logits without scale and bias, and 0 in the padding
    scale_ptr,
    bias_ptr,
    img_ids_ptr,
    txt_ids_ptr,
    img_ignore_ids_ptr,
    txt_ignore_ids_ptr,
    img_weight_ptr,
    txt_weight_ptr,
    totals_ptr,
    rows_ptr,
    columns_ptr,
    B,
    M,
    first_row,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIFT: tl.constexpr,
    WRITES_G: tl.constexpr,
):
    i_b, i_m = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr) * LOG2_E
    bias = tl.load(bias_ptr) * LOG2_E
    o_m = i_m * COLUMNS + tl.arange(0, COLUMNS)
    m_m = o_m < M
    m_x = o_m[None, :] < stride_x
    txt_side = load_side(o_m, M, 0, txt_ids_ptr, txt_ignore_ids_ptr, txt_weight_ptr)

    b_columns = tl.zeros((1, COLUMNS), tl.float32)
    b_graw = tl.zeros((1, COLUMNS), tl.float32)
    b_gsum = tl.zeros((1, COLUMNS), tl.float32)
    for row in range(i_b * ROWS, tl.minimum(i_b * ROWS + ROWS, B)):
        o_b = row + tl.arange(0, 1)
        p_x = x_ptr + o_b.to(tl.int64)[:, None] * stride_x + o_m[None, :]
        b_raw = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [1, COLUMNS]
        b_loss, b_g = pair_terms(
            b_raw,
            load_side(o_b, B, first_row, img_ids_ptr, img_ignore_ids_ptr, img_weight_ptr),
            txt_side,
            m_m,
            scale,
            bias,
            img_ids_ptr is not None,
            img_ignore_ids_ptr is not None,
            img_weight_ptr is not None,
            txt_weight_ptr is not None,
        )
        b_columns += b_loss
        if rows_ptr is not None:
            tl.store(rows_ptr + i_m.to(tl.int64) * B + o_b, tl.sum(b_loss, 1))
        else:
            b_graw += b_g * b_raw
            b_gsum += b_g
        if WRITES_G:
            tl.store(p_x, (b_g * LIFT).to(x_ptr.dtype.element_ty), mask=m_x)

    if columns_ptr is not None:
        p_columns = columns_ptr + i_b.to(tl.int64) * M + o_m[None, :]
        tl.store(p_columns, b_columns, mask=m_m[None, :])
    else:
        p_totals = totals_ptr + (i_b.to(tl.int64) * tl.num_programs(1) + i_m) * 3
        tl.store(p_totals, tl.sum(b_columns))
        tl.store(p_totals + 1, tl.sum(b_graw))
        tl.store(p_totals + 2, tl.sum(b_gsum))


def unsupported(img: Tensor, txt: Tensor) -> str | None:
    if img.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {img.dtype}"
    return None


def _operand(x: Tensor) -> Tensor:
    return x.to(torch.float16) if x.itemsize == 2 else x


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Products sum in float32, also over splits of the depth, whatever the process allows.

    TF32 stays the caller's choice (`torch.backends.cuda.matmul.allow_tf32`).
    """
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
    allowed = [name for name in names if getattr(matmul, name)]
    for name in allowed:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name in allowed:
            setattr(matmul, name, True)


def _chunk(img: Tensor, txt: Tensor, rows: int) -> Tensor:  # (rows, M in whole vectors)
    M = txt.shape[0]
    chunk = img.new_empty(rows, triton.cdiv(M, ALIGNMENT) * ALIGNMENT)
    # The kernel reads the padding and writes it as 0, so that once is enough.
    chunk[:, M:].zero_()
    return chunk


def _pass(
    chunk: Tensor,  # (>= B, M in whole vectors), raw products; G afterwards if writes_g
    B: int,
    M: int,
    scalars: tuple[Tensor, Tensor],
    pairs: tuple[Tensor | None, ...],  # ids, ignore ids and weights, (B_total,) and (M,)
    first_row: int,
    *,
    writes_g: bool = False,
    totals: Tensor | None = None,  # (programs, 3)
    rows: Tensor | None = None,  # (programs across, B)
    columns: Tensor | None = None,  # (programs down, M)
) -> None:
    end = first_row + B
    part = [x[first_row:end] if x is not None and not i % 2 else x for i, x in enumerate(pairs)]
    _pass_kernel[(triton.cdiv(B, ROWS), triton.cdiv(M, COLUMNS))](
        chunk,
        *scalars,
        *part,
        totals,
        rows,
        columns,
        B,
        M,
        first_row,
        chunk.stride(0),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        LIFT=unit_scale(chunk.dtype),
        WRITES_G=writes_g,
        num_warps=NUM_WARPS,
    )


@_float32_sums()
def fwd(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_ignore_ids: Tensor | None,  # (B,)
    txt_ignore_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,) float32
    txt_weight: Tensor | None,  # (M,) float32
    needs_dimg: bool,
    needs_dtxt: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (3,), (B, D) or (0, D), (M, D) or (0, D)
    """Sums of loss, G * raw and G over all pairs, then G @ txt and G.T @ img, all float32."""
    (B, D), M = img.shape, txt.shape[0]
    img, txt = _operand(img), _operand(txt)
    pairs = img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight
    scalars = as_factors(log_scale, bias)
    dimg = img.new_empty((B if needs_dimg else 0, D), dtype=torch.float32)
    dtxt = txt.new_zeros((M if needs_dtxt else 0, D), dtype=torch.float32)
    chunks = list(row_chunks(B, M, MAX_ELEMENTS))
    chunk = _chunk(img, txt, chunks[0][1])
    totals = []
    for start, stop in chunks:
        n, x = stop - start, img[start:stop]
        g = torch.mm(x, txt.T, out=chunk[:n, :M])
        programs = triton.cdiv(n, ROWS) * triton.cdiv(M, COLUMNS)
        part = dimg.new_empty((programs, 3))
        writes_g = needs_dimg or needs_dtxt
        _pass(chunk, n, M, scalars, pairs, start, writes_g=writes_g, totals=part)
        totals.append(part.sum(0, dtype=torch.float64))
        if needs_dimg:
            mm_f32(g, txt, out=dimg[start:stop])
        if needs_dtxt:
            addmm_f32_(dtxt, g.T, x)
    if (lift := unit_scale(img.dtype)) != 1:
        dimg.mul_(1 / lift), dtxt.mul_(1 / lift)
    return torch.stack(totals).sum(0).float(), dimg, dtxt


@_float32_sums()
def sums(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *pairs: Tensor | None,  # as in fwd
) -> tuple[Tensor, Tensor]:  # (B,), (M,) float32
    """The weighted losses summed over each row and each column."""
    B, M = img.shape[0], txt.shape[0]
    img, txt = _operand(img), _operand(txt)
    scalars = as_factors(log_scale, bias)
    rows = img.new_empty(B, dtype=torch.float32)
    columns = txt.new_zeros(M, dtype=torch.float32)
    chunks = list(row_chunks(B, M, MAX_ELEMENTS))
    chunk = _chunk(img, txt, chunks[0][1])
    for start, stop in chunks:
        n = stop - start
        torch.mm(img[start:stop], txt.T, out=chunk[:n, :M])
        row_part = rows.new_empty(triton.cdiv(M, COLUMNS), n)
        column_part = rows.new_empty(triton.cdiv(n, ROWS), M)
        _pass(chunk, n, M, scalars, pairs, start, rows=row_part, columns=column_part)
        rows[start:stop] = row_part.sum(0)
        columns += column_part.sum(0)
    return rows, columns
