"""The function that users call, and its gradients."""

import torch
from torch import Tensor

from .._core.backend import Backend
from .._core.scaled import scaled
from . import reference
from .inputs import product_weight
from .op import fwd, make_plan, weight_norm_bwd


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
        ctx.backend = plan.backend
        normed = student_weight if plan.weight_norm and needs[1] else None
        ctx.save_for_backward(*grads, factor, normed)
        return (losses * rows).sum() * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dstudent, dweight, factor, normed = ctx.saved_tensors
        # A loss scaler's factor arrives before the rounding.
        scale = dloss * factor
        found_student = found_weight = None
        if ctx.needs[0]:
            found_student = scaled(dstudent, scale, ctx.dtypes[0])
        if ctx.needs[1] and normed is None:
            found_weight = scaled(dweight, scale, ctx.dtypes[1])
        elif ctx.needs[1]:
            found_weight = weight_norm_bwd(dweight, normed, scale, ctx.backend)
        return found_student, found_weight, None, None, None, None, None, None


def prototype_cross_entropy(
    student: Tensor,  # (T, D)
    student_weight: Tensor,  # (K, D), dtype of student; or float32, rounded to a 16-bit student's
    teacher: Tensor,  # (S, D)
    teacher_weight: Tensor,  # (K, D), dtype as of student_weight
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    teacher_bias: Tensor | None = None,  # (K,)
    teacher_index: Tensor | None = None,  # (T,) int32 or int64
    token_weight: Tensor | None = None,  # (T,)
    valid_count: Tensor | None = None,  # () int32 or int64
    weight_norm: bool = False,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> Tensor:  # () float32; float64 for float64 inputs
    """sum_t w_t CE_t over prototypes; neither side's (T, K) logits are kept.

    Args:
        student_temp, teacher_temp: What logits are divided by; as 0-D tensors, a schedule compiles
            and captures nothing anew.
        teacher_bias: Added to the teacher's logits: -centre / teacher_temp, or `sinkhorn_bias`.
        teacher_index: The teacher row of each student row, within [0, S): several views may share
            one. None: row t, and S is T.
        token_weight: w_t; None: 1 / T for each.
        valid_count: The first this many student rows count, by default 1 / valid_count each,
            whatever the others hold. Without an index it holds for teacher rows as well.
        weight_norm: Divide the rows of both weights by their norms first; the gradient is that of
            `student_weight` as passed.
        chunk_tokens: Most tokens whose logits the chunked backend holds; None bounds memory.
        backend: None takes the fastest that supports the input, "chunked" on the CPU.

    Differentiable once in student and student_weight, not in the teacher's side. Accumulates in
    float32, deterministic. Kept until the backward: float32 gradients, 4 (T + K) D bytes.

    Raises ValueError for a wrong shape, dtype, device or number, NotImplementedError where the
    asked-for backend does not take this input.
    """
    detached = (teacher, teacher_weight, teacher_bias)
    teacher, teacher_weight, teacher_bias = (x if x is None else x.detach() for x in detached)
    matrices = (student, student_weight, teacher, teacher_weight)
    options = {
        "student_temp": student_temp,
        "teacher_temp": teacher_temp,
        "teacher_bias": teacher_bias,
        "teacher_index": teacher_index,
        "token_weight": token_weight,
        "valid_count": valid_count,
        "weight_norm": weight_norm,
    }
    plan = make_plan(*matrices, **options, chunk_tokens=chunk_tokens, backend=backend)
    if plan.backend == "reference":
        with torch.autocast(student.device.type, enabled=False):
            return reference.prototype_cross_entropy(*matrices, **options)
    needs = tuple(torch.is_grad_enabled() and x.requires_grad for x in matrices[:2])
    return PrototypeLoss.apply(*matrices, teacher_bias, teacher_index, plan, needs)
