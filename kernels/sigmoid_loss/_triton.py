"""Triton backend: a GEMM over tiles of logits whose epilogue is the loss, then two library GEMMs.

Logits stay float32 in registers. What reaches memory is G = dl/dz in the inputs' dtype, for one
chunk of rows at a time, and three sums per tile, which are added up in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, unit_scale
from .._core.tile_product import (
    Tile,
    capability_of,
    has_tma,
    num_programs,
    product_tile,
    split_columns,
    tile_at,
)
from .._core.triton_math import LOG2_E
from ._pair_terms import as_factors, load_side, pair_terms

# G's buffer; 4096 rows at M = 64k. Longer chunks mean fewer passes over the float32 dtxt.
MAX_ELEMENTS = 1 << 28


# Chosen by compile reports (registers, spills, shared memory); no GPU has timed them.
HOPPER = Tile(128, 128, 64, pieces=8, num_warps=8, num_stages=3, blocks=2, is_flat=True)
# Flattening repeats the epilogue here, and eight warps compute each pair twice.
BLACKWELL = Tile(128, 128, 64, pieces=8, num_warps=4, num_stages=3, blocks=2, is_flat=False)
# Flattening spills 32 bytes; three blocks fill each other's gaps without it.
AMPERE = Tile(128, 64, 64, pieces=4, num_warps=4, num_stages=3, blocks=3, is_flat=False)
# A multiprocessor of Ada and of consumer GPUs has 100 KB of shared memory.
CONSUMER = Tile(128, 64, 32, pieces=4, num_warps=4, num_stages=3, blocks=2, is_flat=True)
# Float32 products without TF32 run on the ordinary cores.
FLOAT32 = Tile(64, 64, 32, pieces=2, num_warps=4, num_stages=2, blocks=2, is_flat=True)
# With ids and weights, whose registers cost a block or columns.
FULL = {
    HOPPER: HOPPER._replace(blocks=1),
    BLACKWELL: BLACKWELL._replace(BV=64, pieces=4),
    AMPERE: AMPERE._replace(blocks=2, is_flat=True),
}
GROUP = 8  # tiles of rows that share their columns while those are in L2


def config(
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    is_plain: bool = True,  # neither ids nor weights
    reads_by_tma: bool = True,  # without, Hopper's addresses cost a block as well
) -> Tile:
    if dtype is torch.float32:
        return FLOAT32
    if capability == (8, 0):
        tile = AMPERE
    else:
        tile = {9: HOPPER, 10: BLACKWELL}.get(capability[0], CONSUMER)
    is_light = is_plain and (reads_by_tma or tile is not HOPPER)
    return tile if is_light else FULL.get(tile, tile)


def _choice(
    img: Tensor, txt: Tensor, pairs: Sequence[Tensor | None]
) -> tuple[Tile, bool]:  # the tile, and whether descriptors read the rows
    capability = capability_of(img)
    tma = has_tma(img.dtype, capability, img, txt)
    is_plain = all(x is None for x in pairs)
    return config(img.dtype, capability, is_plain=is_plain, reads_by_tma=tma), tma


@triton.jit(do_not_specialize=["B", "M", "first_row"])  # so that no batch size compiles anything
def _tile_kernel(
    img,  # pointer, or tensor descriptor of blocks [BB, BD] if HAS_TMA
    txt,  # likewise, [BM, BD]
    scale_ptr,
    bias_ptr,
    img_ids_ptr,
    txt_ids_ptr,
    img_ignore_ids_ptr,
    txt_ignore_ids_ptr,
    img_weight_ptr,
    txt_weight_ptr,
    g,  # pointer, or tensor descriptor of blocks [BB, BM / PIECES]; None: not wanted
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
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    LIFT: tl.constexpr,
    HAS_TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    BN: tl.constexpr = BM // PIECES
    scale = tl.load(scale_ptr) * LOG2_E
    bias = tl.load(bias_ptr) * LOG2_E
    num_m = tl.cdiv(M, BM)
    for i_tile in tl.range(
        tl.program_id(0), tl.cdiv(B, BB) * num_m, tl.num_programs(0), flatten=FLATTEN
    ):
        i_b, i_m = tile_at(i_tile, B, M, BB, BM, GROUP)
        b_raw = product_tile(
            img, txt, i_b, i_m, B, M, stride_img, stride_txt, D, BB, BM, BD, HAS_TMA
        )
        o_b = i_b * BB + tl.arange(0, BB)
        m_b = o_b < B
        img_side = load_side(o_b, B, first_row, img_ids_ptr, img_ignore_ids_ptr, img_weight_ptr)
        b_pieces = split_columns(b_raw, BB, BM, PIECES)
        b_rows = tl.zeros((BB,), tl.float32)
        b_graw = tl.zeros((BB,), tl.float32)
        b_gsum = tl.zeros((BB,), tl.float32)
        for piece in tl.static_range(PIECES):
            o_m = i_m * BM + piece * BN + tl.arange(0, BN)
            b_loss, b_g = pair_terms(
                b_pieces[piece],
                img_side,
                load_side(o_m, M, 0, txt_ids_ptr, txt_ignore_ids_ptr, txt_weight_ptr),
                tl.arange(0, BN) < M - i_m * BM - piece * BN,
                scale,
                bias,
                img_ids_ptr is not None,
                img_ignore_ids_ptr is not None,
                img_weight_ptr is not None,
                txt_weight_ptr is not None,
            )
            b_rows += tl.sum(b_loss, 1)
            if columns_ptr is not None:
                b_columns = tl.sum(tl.where(m_b[:, None], b_loss, 0.0), 0)
                tl.store(columns_ptr + i_b.to(tl.int64) * M + o_m, b_columns, mask=o_m < M)
            else:
                b_graw += tl.sum(b_g * b_pieces[piece], 1)
                b_gsum += tl.sum(b_g, 1)
            if g is not None:
                # G is padded to whole tiles, so its stores need no mask.
                if HAS_TMA:
                    g.store([i_b * BB, i_m * BM + piece * BN], (b_g * LIFT).to(g.dtype))
                else:
                    p_g = g + o_b.to(tl.int64)[:, None] * stride_g + o_m[None, :]
                    tl.store(p_g, (b_g * LIFT).to(g.dtype.element_ty))

        if rows_ptr is not None:
            tl.store(rows_ptr + i_m.to(tl.int64) * B + o_b, b_rows, mask=m_b)
        else:
            p_totals = totals_ptr + (i_b.to(tl.int64) * num_m + i_m) * 3
            tl.store(p_totals, tl.sum(tl.where(m_b, b_rows, 0.0)))
            tl.store(p_totals + 1, tl.sum(tl.where(m_b, b_graw, 0.0)))
            tl.store(p_totals + 2, tl.sum(tl.where(m_b, b_gsum, 0.0)))


def unsupported(img: Tensor, txt: Tensor) -> str | None:
    if img.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {img.dtype}"
    if img.stride(1) != 1 or txt.stride(1) != 1:
        return f"needs rows of unit stride, got strides {img.stride()}, {txt.stride()}"
    return None


def _launch(
    img: Tensor,  # (c, D)
    txt: Tensor,  # (M, D)
    scale: Tensor,  # ()
    bias: Tensor,  # ()
    *pairs: Tensor | None,  # ids, ignore ids and weights of c rows and of txt
    first_row: int,
    g: Tensor | None = None,  # (c, M) in whole tiles
    totals: Tensor | None = None,  # (tiles, 3)
    rows: Tensor | None = None,  # (column tiles, c)
    columns: Tensor | None = None,  # (row tiles, M)
) -> None:
    (B, D), M = img.shape, txt.shape[0]
    dtype = img.dtype
    tile, tma = _choice(img, txt, pairs)
    strides = img.stride(0), txt.stride(0), 0 if g is None else g.stride(0)
    if tma:
        img = TensorDescriptor.from_tensor(img, [tile.BT, tile.BD])
        txt = TensorDescriptor.from_tensor(txt, [tile.BV, tile.BD])
        if g is not None:
            g = TensorDescriptor.from_tensor(g, [tile.BT, tile.BV // tile.pieces])
    tiles = triton.cdiv(B, tile.BT) * triton.cdiv(M, tile.BV)
    _tile_kernel[(min(tiles, num_programs(tile, scale.device)),)](
        img,
        txt,
        scale,
        bias,
        *pairs,
        g,
        totals,
        rows,
        columns,
        B,
        M,
        first_row,
        *strides,
        D=D,
        BB=tile.BT,
        BM=tile.BV,
        BD=tile.BD,
        PIECES=tile.pieces,
        GROUP=GROUP,
        LIFT=unit_scale(dtype),
        HAS_TMA=tma,
        FLATTEN=tile.is_flat,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )


def _part(pairs: tuple[Tensor | None, ...], start: int, stop: int) -> list[Tensor | None]:
    """Ids, ignore ids and weights with the images' cut to a chunk of rows."""
    rows_of = range(0, len(pairs), 2)
    return [x[start:stop] if x is not None and i in rows_of else x for i, x in enumerate(pairs)]


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
    pairs = img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight
    tile, _ = _choice(img, txt, pairs)
    scalars = as_factors(log_scale, bias)
    dimg = img.new_empty((B if needs_dimg else 0, D), dtype=torch.float32)
    dtxt = txt.new_zeros((M if needs_dtxt else 0, D), dtype=torch.float32)
    chunks = list(row_chunks(B, M, MAX_ELEMENTS, multiple=tile.BT))
    g = None
    if needs_dimg or needs_dtxt:
        most = triton.cdiv(chunks[0][1], tile.BT) * tile.BT
        g = img.new_empty(most, triton.cdiv(M, tile.BV) * tile.BV)
    totals = []
    for start, stop in chunks:
        x = img[start:stop]
        tiles = triton.cdiv(stop - start, tile.BT) * triton.cdiv(M, tile.BV)
        part = img.new_empty((tiles, 3), dtype=torch.float32)
        outputs = {"g": g, "totals": part}
        _launch(x, txt, *scalars, *_part(pairs, start, stop), first_row=start, **outputs)
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
    *pairs: Tensor | None,  # as in fwd
) -> tuple[Tensor, Tensor]:  # (B,), (M,) float32
    """The weighted losses summed over each row and each column."""
    B, M = img.shape[0], txt.shape[0]
    tile, _ = _choice(img, txt, pairs)
    scalars = as_factors(log_scale, bias)
    rows = img.new_empty(B, dtype=torch.float32)
    columns = txt.new_zeros(M, dtype=torch.float32)
    for start, stop in row_chunks(B, M, MAX_ELEMENTS, multiple=tile.BT):
        n = stop - start
        row_part = rows.new_empty(triton.cdiv(M, tile.BV), n)
        column_part = rows.new_empty(triton.cdiv(n, tile.BT), M)
        outputs = {"rows": row_part, "columns": column_part}
        x = img[start:stop]
        _launch(x, txt, *scalars, *_part(pairs, start, stop), first_row=start, **outputs)
        rows[start:stop] = row_part.sum(0)
        columns += column_part.sum(0)
    return rows, columns
