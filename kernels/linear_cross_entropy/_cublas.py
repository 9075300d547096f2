"""Library backend: one product makes float32 logits, a kernel turns them into gradients in place,
two products use those.

A program takes a token's whole row twice: for its log-sum-exp, then for the gradient, which it
writes over the row in the inputs' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.matmul import addmm_f32_, mm_f32, unit_scale
from .._core.triton_math import LN_2, LOG2_E
from ._exp_tile import capped
from .tokens import token_chunks

# Float32 logits of a chunk: 2,048 tokens of a vocabulary of 256,000, 2.1 GB.
MAX_ELEMENTS = 1 << 29
MIN_TOKENS = 1024
COLUMNS, NUM_WARPS = 4096, 8
ALIGNMENT = 16  # elements to which rows of the chunk are padded


@triton.jit
def _logits(p_z, bias_ptr, o_v, m_v, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits [BV], -inf past the end, and the cap's slope."""
    b_z = tl.load(p_z, mask=m_v, other=0.0)
    if bias_ptr is not None:
        b_z += tl.load(bias_ptr + o_v, mask=m_v, other=0.0)
    b_slope = tl.full(b_z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        b_z, b_slope = capped(b_z, softcap)
    return tl.where(m_v, b_z, -float("inf")), b_slope


# So that no number of tokens compiles anything, nor an odd start of a chunk.
@triton.jit(
    do_not_specialize=["V", "target_ptr", "row_weight_ptr", "losses_ptr", "lse_ptr", "is_best_ptr"]
)
def _row_kernel(
    z_ptr,  # (n, stride_z) raw products
    g_ptr,  # the same memory in the inputs' dtype; None: gradients are not wanted
    target_ptr,
    bias_ptr,
    row_weight_ptr,
    losses_ptr,
    lse_ptr,
    is_best_ptr,
    V,
    stride_z,
    stride_g,
    label_smoothing,
    z_loss,
    softcap,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BV: tl.constexpr,
    LIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row).to(tl.int32)
    z_ptr += row * stride_z
    o_lane = tl.arange(0, BV)
    # Finite, so that a lane that has met nothing subtracts it from -inf.
    b_max = tl.full((BV,), -1.0e38, tl.float32)
    b_sum = tl.zeros((BV,), tl.float32)
    b_all = tl.zeros((BV,), tl.float32)
    for v in range(0, V, BV):
        o_v = v + o_lane
        m_v = o_v < V
        b_z, _ = _logits(z_ptr + o_v, bias_ptr, o_v, m_v, softcap, HAS_SOFTCAP)
        b_new = tl.maximum(b_max, b_z)
        b_sum = b_sum * tl.exp2((b_max - b_new) * LOG2_E) + tl.exp2((b_z - b_new) * LOG2_E)
        b_max = b_new
        if HAS_SMOOTHING:
            b_all += tl.where(m_v, b_z, 0.0)

    top = tl.max(b_max)
    lse = top + tl.log2(tl.sum(b_sum * tl.exp2((b_max - top) * LOG2_E))) * LN_2
    o_y = y + tl.arange(0, 1)
    b_target, _ = _logits(z_ptr + o_y, bias_ptr, o_y, o_y < V, softcap, HAS_SOFTCAP)
    z_y = tl.sum(b_target)
    share = label_smoothing / V
    loss = lse - (1.0 - label_smoothing) * z_y + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss -= share * tl.sum(b_all)
    tl.store(losses_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    if is_best_ptr is not None:
        tl.store(is_best_ptr + row, (z_y >= top).to(is_best_ptr.dtype.element_ty))
    if g_ptr is not None:
        w = tl.load(row_weight_ptr + row) * LIFT
        bend = 1.0 + 2.0 * z_loss * lse
        for v in range(0, V, BV):
            o_v = v + o_lane
            m_v = o_v < V
            b_z, b_slope = _logits(z_ptr + o_v, bias_ptr, o_v, m_v, softcap, HAS_SOFTCAP)
            b_g = tl.exp2((b_z - lse) * LOG2_E) * bend
            b_g -= tl.where(o_v == y, 1.0 - label_smoothing, 0.0)
            if HAS_SMOOTHING:
                b_g -= share
            # Gradients land on logits of this block or of earlier ones: no thread may still read.
            tl.debug_barrier()
            p_g = g_ptr + row * stride_g + o_v
            tl.store(p_g, (b_g * b_slope * w).to(g_ptr.dtype.element_ty), mask=m_v)


def unsupported(
    x: Tensor, weight: Tensor, label_smoothing: float, softcap: float | None
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {x.dtype}"
    return None


def fwd(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,) int64 within [0, V)
    bias: Tensor | None,  # (V,)
    row_weight: Tensor,  # (T,) float32 within [-1, 1], 0 for ignored tokens
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_tokens: int | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    wants_accuracy: bool,
) -> tuple[Tensor, ...]:
    """(T,) losses, (T,) lse, (T,) bool; gradients of the weighted sum of losses, or empty."""
    (T, D), V = x.shape, weight.shape[0]
    bias = None if bias is None else bias.float()
    losses, lse = row_weight.new_empty(T), row_weight.new_empty(T)
    is_best = target.new_zeros(T if wants_accuracy else 0, dtype=torch.bool)
    dx = row_weight.new_empty(T if needs_dx else 0, D)
    dweight = row_weight.new_zeros(V if needs_dweight else 0, D)
    dbias = row_weight.new_zeros(V if needs_dbias else 0)
    lift, needs_grad = unit_scale(x.dtype), needs_dx or needs_dweight or needs_dbias
    chunks = list(
        token_chunks(T, V, chunk_tokens, max_elements=MAX_ELEMENTS, min_tokens=MIN_TOKENS)
    )
    width = triton.cdiv(V, ALIGNMENT) * ALIGNMENT
    logits = row_weight.new_empty(chunks[0][1], width)
    ones = x.new_ones(chunks[0][1], 1) if needs_dbias else None
    for start, stop in chunks:
        part, n = slice(start, stop), stop - start
        rows = x[part]
        mm_f32(rows, weight.T, out=logits[:n, :V])
        g = logits.view(x.dtype)[:n, :V] if needs_grad else None
        best = is_best[part].view(torch.uint8) if wants_accuracy else None
        tokens = (target[part], bias, row_weight[part], losses[part], lse[part], best)
        sizes = (V, width, 0 if g is None else g.stride(0))
        options = (label_smoothing, z_loss, 1.0 if softcap is None else softcap)
        _row_kernel[(n,)](
            *(logits, g, *tokens, *sizes, *options),
            HAS_SMOOTHING=label_smoothing != 0,
            HAS_SOFTCAP=softcap is not None,
            BV=min(COLUMNS, triton.next_power_of_2(V)),
            LIFT=lift,
            num_warps=NUM_WARPS,
        )
        if needs_dx:
            mm_f32(g, weight, out=dx[part])
        if needs_dweight:
            addmm_f32_(dweight, g.T, rows)
        if needs_dbias:
            addmm_f32_(dbias[:, None], g.T, ones[:n])
    if lift != 1:
        dx.mul_(1 / lift), dweight.mul_(1 / lift), dbias.mul_(1 / lift)
    return losses, lse, is_best, dx, dweight, dbias
