"""Triton kernels that sweep rows against columns as attention does: no product reaches memory."""

import triton
import triton.language as tl

from .._core.triton_math import LOG2_E


@triton.jit
def _block(
    x, i, N, stride, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, HAS_TMA: tl.constexpr
):
    """Rows [i BN, (i + 1) BN) of x, [BN, BD]: past the end zeros, or the last row again."""
    if HAS_TMA:
        b_x = x.load([i * BN, 0])
    else:
        o_n = tl.minimum(i * BN + tl.arange(0, BN), N - 1).to(tl.int64)
        o_d = tl.arange(0, BD)
        p_x = x + o_n[:, None] * stride + o_d[None, :]
        b_x = tl.load(p_x) if D == BD else tl.load(p_x, mask=o_d[None, :] < D, other=0.0)
    return b_x


# So that no number of tokens compiles anything.
@triton.jit(do_not_specialize=["R", "N", "blocks"])
def _softmax_kernel(
    rows,  # pointer, or tensor descriptor of blocks [BR, BD] if HAS_TMA
    columns,  # likewise, [BN, BD]
    values,  # likewise; None: they are the columns
    bias_ptr,  # (N,) added to scaled products; None: nothing
    scale_ptr,  # ()
    count_ptr,  # (1,) rows that are wanted; None: all
    acc_ptr,  # (splits, R, D) sum_j 2^(z_j - max) value_j; None: not wanted
    max_ptr,  # (splits, R) max_j z_j, in units of ln 2
    sum_ptr,  # (splits, R) sum_j 2^(z_j - max)
    R,
    N,
    stride_r,
    stride_c,
    stride_v,
    blocks,  # of columns in a split
    D: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # the last block of columns may be partial
    IS_ROUNDED: tl.constexpr,  # sum what the product with values multiplies
    HAS_TMA: tl.constexpr,
):
    # All tiles of rows go through one part of the columns at a time, which stays in L2.
    num_r = tl.cdiv(R, BR)
    i_r = tl.program_id(0) % num_r
    i_split = tl.program_id(0) // num_r
    first = i_split * blocks
    last = tl.minimum(first + blocks, tl.cdiv(N, BN))
    if count_ptr is not None:
        last = tl.where(i_r * BR < tl.load(count_ptr), last, first)
    scale = tl.load(scale_ptr) * LOG2_E
    b_rows = _block(rows, i_r, R, stride_r, D, BR, BD, HAS_TMA)
    # Finite, so that a row that has met nothing subtracts it from -inf.
    b_max = tl.full((BR,), -1.0e38, tl.float32)
    b_sum = tl.zeros((BR,), tl.float32)
    b_acc = tl.zeros((BR, BD), tl.float32)
    for i in range(first, last):
        b_columns = _block(columns, i, N, stride_c, D, BN, BD, HAS_TMA)
        # "ieee" keeps float32 inputs from TF32; half-precision products are exact either way.
        b_z = tl.dot(b_rows, b_columns.T, input_precision="ieee") * scale  # [BR, BN]
        o_n = i * BN + tl.arange(0, BN)
        if bias_ptr is not None:
            b_z += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0)[None, :] * LOG2_E
        if HAS_TAIL:
            b_z = tl.where(o_n[None, :] < N, b_z, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        b_keep = tl.exp2(b_max - b_new)
        b_max = b_new
        b_p = tl.exp2(b_z - b_new[:, None])
        if acc_ptr is None:
            b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        else:
            b_values = b_columns
            if values is not None:
                b_values = _block(values, i, N, stride_v, D, BN, BD, HAS_TMA)
            b_q = b_p.to(b_values.dtype)
            if IS_ROUNDED:
                b_p = b_q.to(tl.float32)
            b_sum = b_sum * b_keep + tl.sum(b_p, 1)
            b_acc = b_acc * b_keep[:, None]
            b_acc = tl.dot(b_q, b_values, b_acc, input_precision="ieee")  # [BR, BD]

    o_r = i_r * BR + tl.arange(0, BR)
    m_r = o_r < R
    o_out = i_split.to(tl.int64) * R + o_r
    tl.store(max_ptr + o_out, b_max, mask=m_r)
    tl.store(sum_ptr + o_out, b_sum, mask=m_r)
    if acc_ptr is not None:
        o_d = tl.arange(0, BD)
        p_acc = acc_ptr + o_out[:, None] * D + o_d[None, :]
        tl.store(p_acc, b_acc, mask=m_r[:, None] & (o_d[None, :] < D))


@triton.jit(do_not_specialize=["R", "splits"])
def _merge_kernel(
    acc_ptr,  # (splits, R, D)
    max_ptr,  # (splits, R)
    sum_ptr,  # (splits, R)
    out_ptr,  # (R, D) softmax-weighted sum of values; 0 for a row that met no column
    lse_ptr,  # (R,) in units of ln 2; -inf for such a row
    R,
    splits,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    top = tl.load(max_ptr + row)
    for i in range(1, splits):
        top = tl.maximum(top, tl.load(max_ptr + row + i * R))
    total = 0.0
    b_acc = tl.zeros((BD,), tl.float32)
    for i in range(0, splits):
        at = row + i * R
        share = tl.exp2(tl.load(max_ptr + at) - top)
        total += share * tl.load(sum_ptr + at)
        b_acc += share * tl.load(acc_ptr + at * D + o_d, mask=m_d, other=0.0)
    tl.store(out_ptr + row * D + o_d, b_acc / tl.where(total > 0, total, 1.0), mask=m_d)
    tl.store(lse_ptr + row, top + tl.log2(total))


@triton.jit
def _add_side(
    b_acc,  # [BK, BD]
    weight,
    rows,
    values,  # None: they are the rows
    bias_ptr,
    lse_ptr,
    factor_ptr,
    scale_ptr,
    i_k,
    K,
    N,
    stride_w,
    stride_z,
    stride_v,
    LOG2_LIFT: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_TMA: tl.constexpr,
):
    """b_acc + 2^LOG2_LIFT sum_j softmax_j(k) factor_j value_j: N rows j, BK prototypes k."""
    scale = tl.load(scale_ptr) * LOG2_E
    b_weight = _block(weight, i_k, K, stride_w, D, BK, BD, HAS_TMA)
    for i in range(0, tl.cdiv(N, BN)):
        b_rows = _block(rows, i, N, stride_z, D, BN, BD, HAS_TMA)
        b_z = tl.dot(b_weight, b_rows.T, input_precision="ieee") * scale  # [BK, BN]
        if bias_ptr is not None:
            o_k = i_k * BK + tl.arange(0, BK)
            b_z += tl.load(bias_ptr + o_k, mask=o_k < K, other=0.0)[:, None] * LOG2_E
        o_n = i * BN + tl.arange(0, BN)
        m_n = o_n < N
        # Past the end probabilities are 2^-inf.
        b_lse = tl.load(lse_ptr + o_n, mask=m_n, other=float("inf"))
        b_p = tl.exp2(b_z - (b_lse - LOG2_LIFT)[None, :])
        if factor_ptr is not None:
            b_p *= tl.load(factor_ptr + o_n, mask=m_n, other=0.0)[None, :]
        b_values = b_rows
        if values is not None:
            b_values = _block(values, i, N, stride_v, D, BN, BD, HAS_TMA)
        b_acc = tl.dot(b_p.to(b_values.dtype), b_values, b_acc, input_precision="ieee")
    return b_acc


# So that no number of tokens compiles anything.
@triton.jit(do_not_specialize=["T", "S"])
def _dweight_kernel(
    student_weight,  # pointers, or tensor descriptors of blocks [BK, BD] if HAS_TMA
    teacher_weight,
    student,  # likewise, [BN, BD]
    teacher,
    teacher_values,  # of its students, summed
    bias_ptr,  # (K,) or None
    student_lse_ptr,  # (T,) in units of ln 2
    teacher_lse_ptr,  # (S,)
    row_weight_ptr,  # (T,)
    teacher_factor_ptr,  # (S,) of the teacher's values; None: 1
    student_scale_ptr,  # ()
    teacher_scale_ptr,  # ()
    student_count_ptr,  # (1,) student rows that count; None: all
    teacher_count_ptr,  # likewise
    dweight_ptr,  # (K, D)
    K,
    T,
    S,
    stride_ws,
    stride_wt,
    stride_zs,
    stride_zt,
    stride_v,
    LOG2_LIFT: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_TMA: tl.constexpr,
):
    i_k = tl.program_id(0)
    num_s, num_t = S, T
    if teacher_count_ptr is not None:
        num_s = tl.minimum(S, tl.load(teacher_count_ptr))
    if student_count_ptr is not None:
        num_t = tl.minimum(T, tl.load(student_count_ptr))
    b_acc = tl.zeros((BK, BD), tl.float32)
    b_acc = _add_side(
        b_acc,
        teacher_weight,
        teacher,
        teacher_values,
        bias_ptr,
        teacher_lse_ptr,
        teacher_factor_ptr,
        teacher_scale_ptr,
        i_k,
        K,
        num_s,
        stride_wt,
        stride_zt,
        stride_v,
        LOG2_LIFT,
        D,
        BK,
        BN,
        BD,
        HAS_TMA,
    )
    b_acc = _add_side(
        -b_acc,
        student_weight,
        student,
        None,
        None,
        student_lse_ptr,
        row_weight_ptr,
        student_scale_ptr,
        i_k,
        K,
        num_t,
        stride_ws,
        stride_zs,
        stride_v,
        LOG2_LIFT,
        D,
        BK,
        BN,
        BD,
        HAS_TMA,
    )
    b_acc *= tl.load(student_scale_ptr) * tl.exp2(-LOG2_LIFT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_d = tl.arange(0, BD)
    p_dweight = dweight_ptr + o_k.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_dweight, b_acc, mask=(o_k[:, None] < K) & (o_d[None, :] < D))


@triton.jit
def _view_sum_kernel(
    student_ptr,
    row_weight_ptr,  # (T,)
    order_ptr,  # (T,) int64, student rows by teacher row
    starts_ptr,  # (S + 1,) int64, where each teacher row's begin
    out_ptr,  # (S, D) sum of its students' rows times their weights
    stride_z,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_sum = tl.zeros((BD,), tl.float32)
    for i in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        t = tl.load(order_ptr + i)
        b_z = tl.load(student_ptr + t * stride_z + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum += tl.load(row_weight_ptr + t) * b_z
    tl.store(out_ptr + row * D + o_d, b_sum.to(out_ptr.dtype.element_ty), mask=m_d)
