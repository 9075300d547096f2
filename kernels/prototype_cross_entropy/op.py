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
from .inputs import Weights, check, check_chunk, check_temp, inverse_temp, weigh

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
# Through the rows' norms, scaled and rounded in the same pass.
torch.library.define(
    "siglip2::prototype_weight_norm_bwd",
    "(Tensor dweight, Tensor weight, Tensor scale, str backend) -> Tensor",
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


@torch.library.impl("siglip2::prototype_weight_norm_bwd", "CompositeExplicitAutograd")
def _(dweight, weight, scale, backend):
    rows_backend = "triton" if backend == "triton" else "eager"
    return unit_rows_grad(dweight, weight, scale, weight.dtype, rows_backend)


@torch.library.register_fake("siglip2::prototype_weight_norm_bwd")
def _(dweight, weight, scale, backend):
    return torch.empty_like(dweight, dtype=weight.dtype)


fwd = torch.ops.siglip2.prototype_cross_entropy.default
lse = torch.ops.siglip2.prototype_lse.default
weight_norm_bwd = torch.ops.siglip2.prototype_weight_norm_bwd.default


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
