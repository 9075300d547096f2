"""The function that users call."""

import torch
from torch import Tensor

from .._core.backend import Backend
from . import reference
from .op import PrototypeLoss, make_plan


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
        student_temp, teacher_temp: What logits are divided by. A 0-D tensor lets a schedule change
            it without compiling or capturing anew.
        teacher_bias: Added to the teacher's logits: -centre / teacher_temp, or `sinkhorn_bias`.
        teacher_index: The teacher row of each student row, within [0, S): several views may share
            one. None: row t, and S is T.
        token_weight: w_t; None: 1 / T for each.
        valid_count: The first this many student rows count, whatever the others hold; w_t is then
            1 / valid_count by default. Without an index it holds for teacher rows as well.
        weight_norm: Divide the rows of both weights by their norms first; the gradient is that of
            `student_weight` as passed.
        chunk_tokens: Most tokens whose logits exist at a time in the chunked backend; None bounds
            memory instead.
        backend: None takes the fastest that supports the input, "chunked" on the CPU.

    Differentiable once in student and student_weight; the teacher's side gets no gradient.
    Accumulates in float32, deterministic. Kept until the backward: float32 gradients,
    4 (T + K) D bytes.

    Raises:
        ValueError: A shape, dtype, device or number is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    teacher, teacher_weight = teacher.detach(), teacher_weight.detach()
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    plan = make_plan(
        *(student, student_weight, teacher, teacher_weight),
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        teacher_bias=teacher_bias,
        teacher_index=teacher_index,
        token_weight=token_weight,
        valid_count=valid_count,
        weight_norm=weight_norm,
        chunk_tokens=chunk_tokens,
        backend=backend,
    )
    if plan.backend == "reference":
        with torch.autocast(student.device.type, enabled=False):
            return reference.prototype_cross_entropy(
                *(student, student_weight, teacher, teacher_weight),
                student_temp=student_temp,
                teacher_temp=teacher_temp,
                teacher_bias=teacher_bias,
                teacher_index=teacher_index,
                token_weight=token_weight,
                valid_count=valid_count,
                weight_norm=weight_norm,
            )
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (student, student_weight)]
    return PrototypeLoss.apply(
        *(student, student_weight, teacher, teacher_weight),
        *(teacher_bias, teacher_index, plan, tuple(needs)),
    )
