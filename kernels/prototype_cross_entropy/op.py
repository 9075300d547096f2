"""Cross entropy of a student's softmax over prototypes against a teacher's, without their logits.

    s_tk = <student_t, student_weight_k> / student_temp,          Q = softmax(s)
    z_ik = <teacher_i, teacher_weight_k> / teacher_temp + bias_k,  P = softmax(z),  i = index_t
    loss_t = log sum_k exp s_tk - sum_k P_ik s_tk
    dl_t/ds_tk = Q_tk - P_ik

Memory O((T + S + K) D) instead of O((T + S) K). FLOPs: 8 T K D in chunks; 8 (T + S) K D in kernels
that store no logit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.backend import choose, no_triton
from .._core.unit_rows import unit_rows_grad
from . import _chunked, dispatch
from .inputs import Weights, check, check_chunk, check_temp, inverse_temp, product_weight, weigh

# Gradients are of sum_t row_weight_t loss_t, in float32, and come back with the forward.
torch.library.define(
    "siglip2::prototype_cross_entropy",
    "(Tensor student, Tensor student_weight, Tensor teacher, Tensor teacher_weight,"
    " Tensor? teacher_bias, Tensor? teacher_index, Tensor row_weight, Tensor? count,"
    " Tensor student_scale, Tensor teacher_scale, int? chunk_tokens,"
    " bool needs_dstudent, bool needs_dweight, str backend)"
    " -> (Tensor losses, Tensor dstudent, Tensor dweight)",
)
torch.library.define(
    "siglip2::prototype_lse",
    "(Tensor rows, Tensor columns, Tensor column_bias, Tensor scale, str backend) -> Tensor",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return _chunked


@torch.library.impl("siglip2::prototype_cross_entropy", "CompositeExplicitAutograd")
def _(student, *args):
    *args, backend = args
    with torch.autocast(student.device.type, enabled=False):
        return _backend(backend).fwd(student, *args)


@torch.library.register_fake("siglip2::prototype_cross_entropy")
def _(student, student_weight, zt, wt, b, i, row_weight, n, ss, st, c, *needs):
    needs_dstudent, needs_dweight, _ = needs
    (T, D), K = student.shape, student_weight.shape[0]
    new = row_weight.new_empty
    return new(T), new(T if needs_dstudent else 0, D), new(K if needs_dweight else 0, D)


@torch.library.impl("siglip2::prototype_lse", "CompositeExplicitAutograd")
def _(rows, columns, column_bias, scale, backend):
    with torch.autocast(rows.device.type, enabled=False):
        return _backend(backend).lse(rows, columns, column_bias, scale)


@torch.library.register_fake("siglip2::prototype_lse")
def _(rows, columns, column_bias, scale, backend):
    return column_bias.new_empty(rows.shape[0])


fwd = torch.ops.siglip2.prototype_cross_entropy.default
lse = torch.ops.siglip2.prototype_lse.default


def unsupported(rows: Tensor, weight: Tensor) -> dict[str, str | None]:
    """Each backend's reason, the one to try first ahead."""
    reasons = {"cuda": "there is no CUDA C++ kernel of this op"}
    reason = no_triton(rows)
    if reason is None:
        reason = _backend("triton").unsupported(rows, weight)
    order = ("triton", "chunked")
    for name in order if dispatch.preferred(rows) == "triton" else reversed(order):
        reasons[name] = reason if name == "triton" else None
    reasons["reference"] = None
    return reasons


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = torch.empty(128, 256, dtype=dtype, device=device)
    return unsupported(rows, rows)


class Plan(NamedTuple):
    """What runs, and what is applied around it."""

    backend: str
    weights: Weights
    student_scale: Tensor  # ()
    teacher_scale: Tensor  # ()
    weight_norm: bool
    chunk_tokens: int | None


def make_plan(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    teacher_bias: Tensor | None,
    teacher_index: Tensor | None,
    token_weight: Tensor | None,
    valid_count: Tensor | None,
    weight_norm: bool,
    chunk_tokens: int | None,
    backend: str | None,
) -> Plan:
    """Raises ValueError and NotImplementedError as `prototype_cross_entropy` says."""
    check(
        *(student, student_weight, teacher, teacher_weight),
        *(teacher_bias, teacher_index, token_weight, valid_count),
    )
    check_temp("student_temp", student_temp, student)
    check_temp("teacher_temp", teacher_temp, student)
    check_chunk(chunk_tokens)
    backend = choose(backend, unsupported(student, student_weight), student.device)
    if student.shape[0] == 0 and backend != "reference":
        backend = "chunked"
    return Plan(
        backend,
        weigh(student, token_weight, valid_count),
        inverse_temp(student_temp, student),
        inverse_temp(teacher_temp, student),
        weight_norm,
        chunk_tokens,
    )


class PrototypeLoss(torch.autograd.Function):
    """Saves float32 gradients, (T + K) D, and the weight's rows where they were normalised."""

    @staticmethod
    def forward(ctx, student, student_weight, teacher, teacher_weight, bias, index, plan, needs):
        rows, factor, count, is_valid = plan.weights
        dtype, scales = student.dtype, (plan.student_scale, plan.teacher_scale)
        read = [student, teacher]
        if is_valid is not None:
            # Whatever lies past the count, 0 times it is to be 0.
            read[0] = torch.where(is_valid[:, None], student, 0)
            if index is None:
                read[1] = torch.where(is_valid[:, None], teacher, 0)
            else:
                index = torch.where(is_valid, index, 0)
        weights = [
            product_weight(w, dtype, plan.weight_norm) for w in (student_weight, teacher_weight)
        ]
        index = None if index is None else index.long()
        losses, *grads = fwd(
            *(read[0], weights[0], read[1], weights[1], bias, index, rows, count, *scales),
            *(plan.chunk_tokens, *needs, plan.backend),
        )
        ctx.dtypes, ctx.needs = (student.dtype, student_weight.dtype), needs
        ctx.rows_backend = "triton" if plan.backend == "triton" else "eager"
        normed = student_weight if plan.weight_norm and needs[1] else None
        ctx.save_for_backward(*grads, factor, normed)
        return (losses * rows).sum() * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dstudent, dweight, factor, normed = ctx.saved_tensors
        # A loss scaler's factor arrives before the rounding.
        scale = dloss * factor
        found = [None, None]
        if ctx.needs[0]:
            found[0] = _scaled(dstudent, scale, ctx.dtypes[0])
        if ctx.needs[1] and normed is None:
            found[1] = _scaled(dweight, scale, ctx.dtypes[1])
        elif ctx.needs[1]:
            found[1] = unit_rows_grad(dweight, normed, scale, normed.dtype, ctx.rows_backend)
        return (*found, *[None] * 6)


def _scaled(d: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # out= scales and rounds in one pass.
    return torch.mul(d, scale, out=torch.empty_like(d, dtype=dtype))
