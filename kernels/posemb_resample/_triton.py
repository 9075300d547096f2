"""Triton backend: a gather of the few table cells that each token weighs; no host loop, no atomics.

Forward: a program makes BT tokens. Backward: a program sums one cell of the table over a share of
the images, in a fixed order; images of one grid are summed before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BT = 16  # tokens of a program
BY, BX = 4, 4  # tokens, down and across, that the backward takes at a time
SPLITS = 16  # shares of the images in the backward
FWD_WARPS, BWD_WARPS = 4, 2


def unsupported(table: Tensor, grid_hw: Tensor) -> str | None:
    if table.dtype is not torch.float32:
        return f"needs a float32 table, got {table.dtype}"
    if not table.is_contiguous():
        return f"needs a contiguous table, got strides {table.stride()}"
    return None


@triton.jit
def _axis(o_i, n, G, o_g, m_g):
    """Row sums of the triangles around cells `o_i` of `n`, and what places them."""
    b_scale = (G + 0.0) / n  # [N]
    b_width = tl.maximum(b_scale, 1.0)
    b_centre = (o_i + 0.5) * b_scale
    b_far = tl.abs(o_g[None, :] + 0.5 - b_centre[:, None]) / b_width[:, None]  # [N, BG]
    b_sum = tl.sum(tl.where(m_g[None, :], tl.maximum(1.0 - b_far, 0.0), 0.0), 1)
    return b_centre, b_width, 1.0 / b_sum


@triton.jit
def _fwd_kernel(
    table_ptr,  # (G, G, D)
    grid_ptr,  # (B, 2)
    first_ptr,  # (B,)
    image_ptr,  # (T,)
    out_ptr,  # (T, D)
    T,
    G,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < T
    b_image = tl.load(image_ptr + o_t, mask=m_t, other=0)
    b_h = tl.load(grid_ptr + 2 * b_image, mask=m_t, other=1)
    b_w = tl.load(grid_ptr + 2 * b_image + 1, mask=m_t, other=1)
    b_at = (o_t - tl.load(first_ptr + b_image, mask=m_t, other=0)).to(tl.int32)
    b_at = tl.where(m_t, b_at, 0)
    b_y = b_at // b_w
    b_x = b_at - b_y * b_w

    o_g = tl.arange(0, BG)
    m_g = o_g < G
    b_cy, b_sy, b_ny = _axis(b_y, b_h, G, o_g, m_g)
    b_cx, b_sx, b_nx = _axis(b_x, b_w, G, o_g, m_g)
    # Cells outside (centre - width, centre + width) weigh nothing.
    b_y0 = tl.maximum((b_cy - b_sy + 0.5).to(tl.int32), 0)
    b_x0 = tl.maximum((b_cx - b_sx + 0.5).to(tl.int32), 0)
    num_y = tl.max(tl.minimum((b_cy + b_sy + 0.5).to(tl.int32) + 1, G) - b_y0)
    num_x = tl.max(tl.minimum((b_cx + b_sx + 0.5).to(tl.int32) + 1, G) - b_x0)

    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_out = tl.zeros((BT, BD), tl.float32)
    for i in range(0, num_y):
        b_gy = b_y0 + i
        b_wy = tl.maximum(1.0 - tl.abs(b_gy + 0.5 - b_cy) / b_sy, 0.0) * b_ny
        for j in range(0, num_x):
            b_gx = b_x0 + j
            b_wx = tl.maximum(1.0 - tl.abs(b_gx + 0.5 - b_cx) / b_sx, 0.0) * b_nx
            m_cell = m_t & (b_gy < G) & (b_gx < G)
            p_cell = table_ptr + (b_gy * G + b_gx)[:, None] * D + o_d[None, :]
            b_cell = tl.load(p_cell, mask=m_cell[:, None] & m_d[None, :], other=0.0)
            b_out += (b_wy * b_wx)[:, None] * b_cell
    p_out = out_ptr + o_t[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def _reach(i_g, n, G):
    """Cells of `n` whose triangles may cover cell `i_g` of G: [first, last)."""
    scale = (G + 0.0) / n
    width = tl.maximum(scale, 1.0)
    first = tl.floor((i_g + 0.5 - width) / scale - 0.5).to(tl.int32)
    last = tl.ceil((i_g + 0.5 + width) / scale - 0.5).to(tl.int32) + 1
    return tl.maximum(first, 0), tl.minimum(last, n)


@triton.jit
def _weights(i_g, o_i, n, G, o_g, m_g):  # [N]
    """What cells `o_i` of `n` weigh cell `i_g` of G."""
    b_centre, b_width, b_norm = _axis(o_i, n, G, o_g, m_g)
    return tl.maximum(1.0 - tl.abs(i_g + 0.5 - b_centre) / b_width, 0.0) * b_norm


@triton.jit(do_not_specialize=("B", "images"))
def _bwd_kernel(
    dout_ptr,  # (T, D)
    grid_ptr,  # (B, 2)
    first_ptr,  # (B,)
    part_ptr,  # (SPLITS, G, G, D)
    B,
    images,  # of a split
    G,
    D: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
):
    i_cell, i_split = tl.program_id(0), tl.program_id(1)
    i_gy, i_gx = i_cell // G, i_cell % G
    o_d = tl.program_id(2) * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_g = tl.arange(0, BG)
    m_g = o_g < G
    o_yx = tl.arange(0, BY * BX)
    b_sum = tl.zeros((BY * BX, BD), tl.float32)
    for i in range(i_split * images, tl.minimum(i_split * images + images, B)):
        h = tl.load(grid_ptr + 2 * i)
        w = tl.load(grid_ptr + 2 * i + 1)
        first = tl.load(first_ptr + i)
        y0, y1 = _reach(i_gy, tl.maximum(h, 1), G)
        x0, x1 = _reach(i_gx, tl.maximum(w, 1), G)
        y1 = tl.where(h * w > 0, y1, 0)  # an image without patches
        for y in range(y0, y1, BY):
            o_y = y + o_yx // BX
            b_wy = _weights(i_gy, o_y, h, G, o_g, m_g)
            for x in range(x0, x1, BX):
                o_x = x + o_yx % BX
                b_w = b_wy * _weights(i_gx, o_x, w, G, o_g, m_g)
                # A token that weighs nothing is not read.
                m_yx = (o_y < y1) & (o_x < x1) & (b_w > 0)
                p_d = dout_ptr + (first + o_y * w + o_x)[:, None] * D + o_d[None, :]
                b_d = tl.load(p_d, mask=m_yx[:, None] & m_d[None, :], other=0.0)
                b_sum += tl.where(m_yx, b_w, 0.0)[:, None] * b_d.to(tl.float32)
    p_part = part_ptr + (i_split * G * G + i_cell).to(tl.int64) * D + o_d
    tl.store(p_part, tl.sum(b_sum, 0), mask=m_d)


def _block_d(D: int) -> int:
    return min(triton.next_power_of_2(D), 128)


def _places(grid_hw: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 2) int32 grids, (B,) int64 first rows and (B,) int64 row counts, on the device."""
    grid = grid_hw.to(device, torch.int32, non_blocking=True).contiguous()
    counts = grid.long().prod(1)
    return grid, counts.cumsum(0) - counts, counts


def fwd(table: Tensor, grid_hw: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:  # (T, D)
    G, D = table.shape[1:]
    out = table.new_empty(num_tokens, D, dtype=dtype)
    grid, first, counts = _places(grid_hw, table.device)
    images = torch.arange(len(grid), device=table.device, dtype=torch.int32)
    image = torch.repeat_interleave(images, counts, output_size=num_tokens)
    BD = _block_d(D)
    _fwd_kernel[(triton.cdiv(num_tokens, BT), triton.cdiv(D, BD))](
        table,
        grid,
        first,
        image,
        out,
        num_tokens,
        G,
        D=D,
        BT=BT,
        BD=BD,
        BG=triton.next_power_of_2(G),
        num_warps=FWD_WARPS,
    )
    return out


def _is_one_grid(grid_hw: Tensor) -> bool:
    """Whether all images have one grid, if the host knows: a device is not waited for."""
    return grid_hw.device.type == "cpu" and bool((grid_hw == grid_hw[:1]).all())


def bwd(dout: Tensor, grid_hw: Tensor, table: Tensor) -> Tensor:  # (G, G, D)
    if len(grid_hw) > 1 and _is_one_grid(grid_hw):
        # The resampling is linear: images are summed first, and one is brought to the table.
        dout = dout.view(len(grid_hw), -1, dout.shape[1]).sum(0, dtype=torch.float32)
        grid_hw = grid_hw[:1]
    return _bwd(dout, grid_hw, table)


def _bwd(dout: Tensor, grid_hw: Tensor, table: Tensor) -> Tensor:  # (G, G, D)
    G, D = table.shape[1:]
    grid, first, _ = _places(grid_hw, table.device)
    images = triton.cdiv(len(grid), SPLITS)
    splits = triton.cdiv(len(grid), images)
    part = table.new_empty(splits, G, G, D)
    BD = _block_d(D)
    _bwd_kernel[(G * G, splits, triton.cdiv(D, BD))](
        dout,
        grid,
        first,
        part,
        len(grid),
        images,
        G,
        D=D,
        BY=BY,
        BX=BX,
        BD=BD,
        BG=triton.next_power_of_2(G),
        num_warps=BWD_WARPS,
    )
    return part.sum(0)
