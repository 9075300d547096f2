"""Eager backend with bounded memory: the logits of a chunk of tokens come and go. Any device.

Student and teacher are at hand together, so one matrix Q - P serves both gradients: 8 T K D FLOPs,
float32 logits (float64 for float64 inputs).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, product_dtype, unit_scale

# Logits of a chunk on one side, float32; three such matrices exist at a time. Longer chunks mean
# fewer passes over the float32 dweight.
MAX_ELEMENTS = {"cpu": 1 << 24}
MAX_ELEMENTS_DEVICE = 1 << 27
MULTIPLE = 128


def unsupported(student: Tensor, student_weight: Tensor) -> str | None:
    return None


def _chunks(rows: Tensor, columns: int, chunk_rows: int | None) -> Iterator[tuple[int, int]]:
    if chunk_rows is not None:
        return row_chunks(rows.shape[0], 1, chunk_rows)
    most = MAX_ELEMENTS.get(rows.device.type, MAX_ELEMENTS_DEVICE)
    return row_chunks(rows.shape[0], columns, most, MULTIPLE)


def _exp_(z: Tensor) -> tuple[Tensor, Tensor]:  # (c, 1), (c, 1)
    """z becomes exp(z - max z); returns its row sums and the log-sum-exp."""
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    return total, total.log().add_(top)


def fwd(
    student: Tensor,  # (T, D)
    student_weight: Tensor,  # (K, D) dtype of student
    teacher: Tensor,  # (S, D)
    teacher_weight: Tensor,  # (K, D) dtype of student
    teacher_bias: Tensor | None,  # (K,)
    teacher_index: Tensor | None,  # (T,) int64 within [0, S); None: S is T
    row_weight: Tensor,  # (T,) float32 or float64 within [-1, 1]
    count: Tensor | None,  # (1,) int32: row_weight is 0 from there on
    student_scale: Tensor,  # () dtype of row_weight
    teacher_scale: Tensor,  # ()
    chunk_tokens: int | None,
    needs_dstudent: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) losses; gradients of the sum of row_weight times losses, or empty."""
    (T, D), K = student.shape, student_weight.shape[0]
    losses = row_weight.new_empty(T)
    dstudent = row_weight.new_zeros(T if needs_dstudent else 0, D)
    dweight = row_weight.new_zeros(K if needs_dweight else 0, D)
    dtype = product_dtype(student)
    ws, wt, lift = student_weight.to(dtype), teacher_weight.to(dtype), unit_scale(dtype)
    bias = None if teacher_bias is None else teacher_bias.to(row_weight.dtype)
    buffers = None
    for start, stop in _chunks(student, K, chunk_tokens):
        part = slice(start, stop)
        if buffers is None:  # the first chunk is the longest
            buffers = row_weight.new_empty(2, stop, K)
        s, t = buffers[:, : stop - start]
        zs = student[part].to(dtype)
        zt = teacher[part] if teacher_index is None else teacher[teacher_index[part]]
        mm_f32(zs, ws.T, out=s).mul_(student_scale)
        mm_f32(zt.to(dtype), wt.T, out=t).mul_(teacher_scale)
        if bias is not None:
            t.add_(bias)
        total, _ = _exp_(t)
        p = t.div_(total)
        cross = torch.linalg.vecdot(p, s)
        total, lse = _exp_(s)
        torch.sub(lse[:, 0], cross, out=losses[part])
        if not needs_dstudent and not needs_dweight:
            continue
        g = s.div_(total).sub_(p).mul_(row_weight[part, None] * lift).to(dtype)
        if needs_dstudent:
            mm_f32(g, ws, out=dstudent[part])
        if needs_dweight:
            addmm_f32_(dweight, g.T, zs)
    factor = student_scale / lift
    return losses, dstudent.mul_(factor), dweight.mul_(factor)


def lse(
    rows: Tensor,  # (R, D)
    columns: Tensor,  # (N, D) dtype of rows
    column_bias: Tensor,  # (N,) float32 or float64; -inf leaves a column out
    scale: Tensor,  # ()
) -> Tensor:  # (R,) log sum_j exp(scale <row, column_j> + bias_j)
    dtype = product_dtype(rows)
    found, columns = column_bias.new_empty(rows.shape[0]), columns.to(dtype)
    for start, stop in _chunks(rows, columns.shape[0], None):
        z = mm_f32(rows[start:stop].to(dtype), columns.T).mul_(scale).add_(column_bias)
        torch.logsumexp(z, 1, out=found[start:stop])
    return found
