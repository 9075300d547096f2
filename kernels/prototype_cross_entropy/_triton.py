"""Triton backend: sweeps over prototypes, then over tokens, in which logits stay in registers.

    y = softmax(z) student_weight,  x = softmax(s) student_weight      rows: tokens
    loss = lse(s) - <student, y> / temp,  dstudent = w (x - y) / temp
    dweight = (softmax(s)^T (w student) - softmax(z)^T view_sums) / temp     rows: prototypes

with view_sums the weighted sum of the students of each teacher row (one student if there is no
index). Each row of each result belongs to one program, or to a fixed number of parts merged in
order: nothing is added atomically.
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._core.matmul import unit_scale
from .._core.tile_product import capability_of, has_tma
from ._sweep import _dweight_kernel, _merge_kernel, _softmax_kernel, _view_sum_kernel

LN_2 = math.log(2)
# Widest bottleneck whose sums over a tile of rows fit the registers of a multiprocessor.
MAX_D = 512
# Of the sums of all parts; with float32 dweight, which comes after them, the peak of a pass.
MAX_PARTIAL_BYTES = 1 << 26


# A log-sum-exp alone; a softmax whose values are its columns; one whose values are others; dweight.
Kind = Literal["lse", "shared", "separate", "dweight"]


class Sweep(NamedTuple):
    BR: int  # rows of a program
    BN: int  # columns of a step
    num_warps: int
    num_stages: int


def config(D: int, dtype: torch.dtype, capability: tuple[int, int], what: Kind) -> Sweep:
    """By compile reports (registers, spills, shared memory); no GPU has timed them."""
    is_wide = D > 256
    if dtype is torch.float32:
        # Products without tensor cores spill where a thread sums more than this.
        return Sweep(16, 16, 8, 1) if is_wide or what == "dweight" else Sweep(32, 32, 8, 1)
    if capability[0] in (9, 10):
        if what == "lse":
            return Sweep(64, 64, 4, 2) if is_wide else Sweep(128, 128, 8, 2)
        if is_wide:
            return Sweep(64, 32, 8, 2)
        if capability[0] == 10 and what != "dweight":
            return Sweep(64, 64, 8, 2)
        return Sweep(128, 64, 8, 3 if what == "shared" else 2)
    if capability == (8, 0):
        return Sweep(64, 32, 8, 2) if is_wide else Sweep(128, 32, 8, 2)
    # A multiprocessor of Ada and of consumer GPUs has 100 KB of shared memory.
    return Sweep(32, 16, 8, 2) if is_wide else Sweep(64, 32, 4, 2)


def unsupported(rows: Tensor, weight: Tensor) -> str | None:
    if rows.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {rows.dtype}"
    if rows.shape[1] > MAX_D:
        return f"needs a bottleneck of at most {MAX_D}, got D={rows.shape[1]}"
    return None


def num_splits(tiles: int, blocks: int, programs: int, most: int) -> int:
    """Parts of the columns with which `programs` at a time finish first; on a tie the fewest.

    Args:
        tiles: Of rows, each of which sweeps all `blocks` of columns.
        most: What memory allows.
    """
    last = max(min(-(-4 * programs // tiles), blocks, most), 1)
    return min(range(1, last + 1), key=lambda n: (-(-tiles * n // programs) * -(-blocks // n), n))


def _num_programs(device: torch.device) -> int:
    """As many as run at a time, one a multiprocessor; under the interpreter few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Swept(NamedTuple):
    out: Tensor | None  # (R, D) float32
    lse: Tensor  # (R,) float32, in units of ln 2


def _sweep(
    rows: Tensor,  # (R, D)
    columns: Tensor,  # (N, D)
    values: Tensor | None,  # (N, D); None: only the log-sum-exp is wanted
    bias: Tensor | None,  # (N,) float32
    scale: Tensor,  # ()
    count: Tensor | None = None,  # (1,) int32
    *,
    has_tail: bool,
    is_rounded: bool = False,
) -> _Swept:
    (R, D), N, device = rows.shape, columns.shape[0], rows.device
    is_shared = values is columns
    what = "lse" if values is None else "shared" if is_shared else "separate"
    tile = config(D, rows.dtype, capability_of(rows), what)
    tiles, blocks = triton.cdiv(R, tile.BR), triton.cdiv(N, tile.BN)
    most = MAX_PARTIAL_BYTES // (4 * R * (D if values is not None else 2))
    n = num_splits(tiles, blocks, _num_programs(device), most)
    # Not halves of one tensor: how the second is aligned would depend on R, and compile anew.
    tops, sums = (torch.empty(n, R, dtype=torch.float32, device=device) for _ in range(2))
    acc = None if values is None else tops.new_empty(n, R, D)
    BD = max(triton.next_power_of_2(D), 16)
    read = [rows, columns, None if is_shared else values]
    tma = has_tma(rows.dtype, capability_of(rows), *(x for x in read if x is not None))
    strides = [0 if x is None else x.stride(0) for x in read]
    if tma:
        heights = (tile.BR, tile.BN, tile.BN)
        read = [_described(x, h, BD) for x, h in zip(read, heights, strict=True)]
    _softmax_kernel[(tiles * n,)](
        *(*read, bias, scale, count, acc, tops, sums),
        *(R, N, *strides, triton.cdiv(blocks, n)),
        D=D,
        BR=tile.BR,
        BN=tile.BN,
        BD=BD,
        HAS_TAIL=has_tail,
        IS_ROUNDED=is_rounded,
        HAS_TMA=tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if acc is None:
        top = tops.amax(0)
        total = torch.exp2(tops - top).mul_(sums).sum(0)
        return _Swept(None, total.log2_().add_(top))
    out = torch.empty(R, D, dtype=torch.float32, device=device)
    lse = torch.empty(R, dtype=torch.float32, device=device)
    _merge_kernel[(R,)](acc, tops, sums, out, lse, R, n, D=D, BD=BD, num_warps=2)
    return _Swept(out, lse)


def _described(x: Tensor | None, height: int, width: int) -> TensorDescriptor | None:
    return None if x is None else TensorDescriptor.from_tensor(x, [height, width])


def _contiguous(*matrices: Tensor) -> list[Tensor]:
    """Rows of unit stride: a bottleneck is small beside what its sweeps read."""
    return [x if x.stride(1) == 1 else x.contiguous() for x in matrices]


def fwd(
    student: Tensor,  # (T, D)
    student_weight: Tensor,  # (K, D) dtype of student
    teacher: Tensor,  # (S, D)
    teacher_weight: Tensor,  # (K, D) dtype of student
    teacher_bias: Tensor | None,  # (K,)
    teacher_index: Tensor | None,  # (T,) int64 within [0, S); None: S is T
    row_weight: Tensor,  # (T,) float32 within [-1, 1]
    count: Tensor | None,  # (1,) int32: row_weight is 0 from there on
    student_scale: Tensor,  # () float32
    teacher_scale: Tensor,  # ()
    chunk_tokens: int | None,
    needs_dstudent: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) losses; gradients of the sum of row_weight times losses, or empty."""
    student, student_weight, teacher, teacher_weight = _contiguous(
        student, student_weight, teacher, teacher_weight
    )
    K, D = student_weight.shape
    bias = None if teacher_bias is None else teacher_bias.float()
    teacher_count = count if teacher_index is None else None
    has_tail = K % 128 != 0  # every configuration's blocks divide 128
    y, teacher_lse = _sweep(
        *(teacher, teacher_weight, student_weight, bias, teacher_scale, teacher_count),
        has_tail=has_tail,
        is_rounded=True,
    )
    values = student_weight if needs_dstudent else None
    x, student_lse = _sweep(
        *(student, student_weight, values, None, student_scale, count), has_tail=has_tail
    )
    y = y if teacher_index is None else y.index_select(0, teacher_index)
    losses = student_lse * LN_2 - (student * y).sum(1).mul_(student_scale)
    losses.masked_fill_(row_weight == 0, 0)
    dstudent = row_weight.new_empty(0, D)
    if needs_dstudent:
        dstudent = x.sub_(y).mul_((row_weight * student_scale)[:, None])
    del x, y
    dweight = row_weight.new_empty(K if needs_dweight else 0, D)
    if needs_dweight:
        values, factor = student, row_weight
        if teacher_index is not None:
            values, factor = _view_sums(student, row_weight, teacher_index, len(teacher)), None
        # A row past the count met no prototype; as +inf its log-sum-exp leaves it out for good.
        lses = [x.masked_fill_(x == -torch.inf, torch.inf) for x in (student_lse, teacher_lse)]
        matrices = (student_weight, teacher_weight, student, teacher, values)
        vectors = (bias, *lses, row_weight, factor, student_scale, teacher_scale)
        vectors = (*vectors, count, teacher_count)
        _launch_dweight(matrices, vectors, dweight)
    return losses, dstudent, dweight


def _view_sums(
    student: Tensor, row_weight: Tensor, index: Tensor, S: int
) -> Tensor:  # (S, D) dtype of student
    """Sum of each teacher row's students times their weights."""
    out = student.new_empty(S, student.shape[1])
    ordered, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(S + 1, device=index.device))
    D, BD = student.shape[1], triton.next_power_of_2(student.shape[1])
    _view_sum_kernel[(S,)](
        *(student, row_weight, order, starts, out, student.stride(0)), D=D, BD=BD, num_warps=2
    )
    return out


def _launch_dweight(matrices: tuple, vectors: tuple, dweight: Tensor) -> None:
    student_weight, _, student, teacher, _ = matrices
    (K, D), T, S = student_weight.shape, student.shape[0], teacher.shape[0]
    tile = config(D, student.dtype, capability_of(student), "dweight")
    BD = max(triton.next_power_of_2(D), 16)
    strides = [x.stride(0) for x in matrices]
    tma = has_tma(student.dtype, capability_of(student), *matrices)
    if tma:
        heights = (tile.BR, tile.BR, tile.BN, tile.BN, tile.BN)
        matrices = [_described(x, h, BD) for x, h in zip(matrices, heights, strict=True)]
    _dweight_kernel[(triton.cdiv(K, tile.BR),)](
        *(*matrices, *vectors, dweight, K, T, S, *strides),
        LOG2_LIFT=math.log2(unit_scale(student.dtype)),
        D=D,
        BK=tile.BR,
        BN=tile.BN,
        BD=BD,
        HAS_TMA=tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def lse(
    rows: Tensor,  # (R, D)
    columns: Tensor,  # (N, D) dtype of rows
    column_bias: Tensor,  # (N,) float32; -inf leaves a column out
    scale: Tensor,  # ()
) -> Tensor:  # (R,) log sum_j exp(scale <row, column_j> + bias_j)
    rows, columns = _contiguous(rows, columns)
    return _sweep(rows, columns, None, column_bias, scale, has_tail=True).lse.mul_(LN_2)
