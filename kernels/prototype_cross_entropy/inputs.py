"""What the prototype cross entropy accepts, and how its tokens are weighted."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.unit_rows import EPS

_INTEGERS = (torch.int32, torch.int64)


class Weights(NamedTuple):
    """What each token counts, within [-1, 1] so that float16 gradients stay in range."""

    rows: Tensor  # (T,) float32 or float64, 0 for tokens past the count
    factor: Tensor  # (), of the sum of `rows` times losses
    count: Tensor | None  # (1,) int32, tokens that count; None: all
    is_valid: Tensor | None  # (T,) bool


def weigh(student: Tensor, token_weight: Tensor | None, valid_count: Tensor | None) -> Weights:
    """1 / T for every token, or 1 / count; or what the caller says."""
    T, acc = student.shape[0], torch.promote_types(student.dtype, torch.float32)
    ones = torch.ones(T, dtype=acc, device=student.device)
    rows, count, is_valid = ones if token_weight is None else token_weight.to(acc), None, None
    if valid_count is not None:
        count = valid_count.detach().to(torch.int32).clamp(0, T).reshape(1)
        is_valid = torch.arange(T, device=student.device) < count
        rows = torch.where(is_valid, rows, 0)
    if token_weight is None:
        total = rows.sum().clamp(min=1)
        return Weights(rows, 1 / total, count, is_valid)
    most = torch.cat((rows.abs(), rows.new_zeros(1))).amax()
    return Weights(rows / torch.where(most > 0, most, 1), most, count, is_valid)


def inverse_temp(temp: float | Tensor, like: Tensor) -> Tensor:  # ()
    """A factor on logits, on the device: schedules neither recompile nor capture anew."""
    acc = torch.promote_types(like.dtype, torch.float32)
    if isinstance(temp, Tensor):
        return temp.detach().to(acc).reciprocal()
    return torch.full((), 1 / temp, dtype=acc, device=like.device)


def product_weight(weight: Tensor, dtype: torch.dtype, weight_norm: bool) -> Tensor:  # (K, D)
    """As the products read it: rows over their norms if asked, rounded once."""
    if not weight_norm:
        return weight.to(dtype)
    acc = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=acc)
    # out= divides and rounds in one pass.
    return torch.div(weight, norm.add_(EPS), out=torch.empty_like(weight, dtype=dtype))


def check(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    teacher_index: Tensor | None,
    token_weight: Tensor | None,
    valid_count: Tensor | None,
) -> None:
    """Raises ValueError."""
    shapes = [tuple(x.shape) for x in (student, student_weight, teacher, teacher_weight)]
    is_matrix = all(len(shape) == 2 for shape in shapes)
    if not is_matrix or len({s[-1] for s in shapes}) > 1 or shapes[1] != shapes[3]:
        raise ValueError(
            "need student (T, D), student_weight (K, D), teacher (S, D), teacher_weight (K, D);"
            f" got {', '.join(map(str, shapes))}"
        )
    T, S, K = student.shape[0], teacher.shape[0], student_weight.shape[0]
    if K == 0:
        raise ValueError("need at least one prototype; got K=0")
    _check_dtypes("student", student, "student_weight", student_weight)
    _check_dtypes("student", student, "teacher_weight", teacher_weight)
    if teacher.dtype != student.dtype:
        raise ValueError(f"need teacher of student's dtype, {student.dtype}; got {teacher.dtype}")
    check_vector("teacher_bias", teacher_bias, K)
    check_vector("token_weight", token_weight, T)
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError(
            "token_weight gets no gradient, but it requires one; pass token_weight.detach()"
        )
    if teacher_index is None and S != T:
        raise ValueError(
            f"need one teacher row for each student row, or teacher_index; got T={T}, S={S}"
        )
    if teacher_index is not None:
        if teacher_index.shape != (T,) or teacher_index.dtype not in _INTEGERS:
            got = f"{tuple(teacher_index.shape)} {teacher_index.dtype}"
            raise ValueError(f"need teacher_index ({T},) of int32 or int64; got {got}")
        if T and not S:
            raise ValueError("need at least one teacher row for teacher_index; got S=0")
    check_count(valid_count)
    check_devices(
        student,
        "student",
        student_weight=student_weight,
        teacher=teacher,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_index=teacher_index,
        token_weight=token_weight,
        valid_count=valid_count,
    )


def _check_dtypes(rows_name: str, rows: Tensor, name: str, weight: Tensor) -> None:
    is_rounded = weight.dtype is torch.float32 and rows.dtype.itemsize == 2
    if not rows.dtype.is_floating_point or not (weight.dtype == rows.dtype or is_rounded):
        raise ValueError(
            f"need {rows_name} and {name} of one floating-point dtype, or a float32 weight for"
            f" 16-bit rows; got {rows.dtype}, {weight.dtype}"
        )


def check_teacher(teacher: Tensor, weight: Tensor, valid_count: Tensor | None) -> None:
    """Of functions that look at the teacher alone. Raises ValueError."""
    if teacher.ndim != 2 or weight.ndim != 2 or teacher.shape[1] != weight.shape[1]:
        got = f"{tuple(teacher.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"need teacher (S, D), teacher_weight (K, D); got {got}")
    if weight.shape[0] == 0:
        raise ValueError("need at least one prototype; got K=0")
    _check_dtypes("teacher", teacher, "teacher_weight", weight)
    check_count(valid_count)
    check_devices(teacher, "teacher", teacher_weight=weight, valid_count=valid_count)


def check_vector(name: str, vector: Tensor | None, n: int) -> None:
    if vector is not None and (vector.shape != (n,) or not vector.dtype.is_floating_point):
        got = f"{tuple(vector.shape)} {vector.dtype}"
        raise ValueError(f"need {name} ({n},) of a floating-point dtype; got {got}")


def check_count(count: Tensor | None) -> None:
    if count is not None and (count.numel() != 1 or count.dtype not in _INTEGERS):
        got = f"{tuple(count.shape)} {count.dtype}"
        raise ValueError(f"need valid_count () of int32 or int64; got {got}")


def check_devices(first: Tensor, first_name: str, **named: Tensor | None) -> None:
    for name, tensor in named.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"need all tensors on {first_name}'s device, {first.device};"
                f" {name} is on {tensor.device}"
            )


def check_temp(name: str, temp: float | Tensor, like: Tensor) -> None:
    """A schedule may hand over a 0-D tensor, whose value only the device knows."""
    if not isinstance(temp, Tensor):
        if not temp > 0:
            raise ValueError(f"need {name} > 0; got {temp}")
        return
    if temp.ndim or not temp.dtype.is_floating_point or temp.requires_grad:
        got = f"{tuple(temp.shape)} {temp.dtype}{', learned' if temp.requires_grad else ''}"
        raise ValueError(f"need {name} a number, or a () float tensor without gradient; got {got}")
    check_devices(like, "student", **{name: temp})


def check_chunk(chunk_tokens: int | None) -> None:
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ValueError(f"need chunk_tokens >= 1, or None for the default; got {chunk_tokens}")
