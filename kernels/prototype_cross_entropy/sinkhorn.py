"""How a teacher's prototypes are balanced: Sinkhorn-Knopp as a bias, and the mean for a centre."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .._core.backend import Backend, choose
from . import reference
from .inputs import check_teacher, check_temp, inverse_temp, product_weight
from .op import lse, unsupported


def _is_valid(rows: Tensor, valid_count: Tensor | None) -> Tensor | None:  # (S,) bool
    if valid_count is None:
        return None
    return torch.arange(rows.shape[0], device=rows.device) < valid_count


def _merged(lse: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # (K,)
    """Log-sum-exp over all ranks: exact maximum first, then one sum."""
    if group is None:
        return lse
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    # No token on any rank: -inf - -inf is no number.
    total = (lse - torch.where(top.isfinite(), top, 0)).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return total.log() + top


@torch.no_grad()
def sinkhorn_bias(
    teacher: Tensor,  # (S, D), this rank's tokens
    teacher_weight: Tensor,  # (K, D), dtype of teacher; or float32 for a 16-bit teacher
    *,
    teacher_temp: float | Tensor,
    iterations: int = 3,
    valid_count: Tensor | None = None,  # () int32 or int64
    weight_norm: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (K,) float32; float64 for float64 inputs
    """`teacher_bias` that makes the teacher's softmax DINOv2's Sinkhorn-Knopp assignment.

    Args:
        teacher_temp: What logits are divided by; a number or a 0-D tensor.
        iterations: Alternations of prototypes and tokens; DINOv2 takes 3.
        valid_count: The first this many rows count, whatever the others hold.
        weight_norm: Divide the rows of the weight by their norms first.
        group: Ranks whose tokens are balanced together: two all-reduces of (K,) an iteration, and
            all of them get the same bits. None: this process alone. Every rank has to call.
        backend: None takes the fastest that supports the input, "chunked" on the CPU.

    Without gradient. 2 (2 iterations - 1) S K D FLOPs, no (S, K) tensor is kept.

    Raises:
        ValueError: A shape, dtype, device or number is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    check_teacher(teacher, teacher_weight, valid_count)
    check_temp("teacher_temp", teacher_temp, teacher)
    if iterations < 1:
        raise ValueError(f"need iterations >= 1; got {iterations}")
    backend = choose(backend, unsupported(teacher, teacher_weight), teacher.device)
    weight = product_weight(teacher_weight, teacher.dtype, weight_norm)
    scale, is_valid = inverse_temp(teacher_temp, teacher), _is_valid(teacher, valid_count)
    of_tokens = scale.new_zeros(teacher.shape[0])
    if is_valid is not None:
        teacher = torch.where(is_valid[:, None], teacher, 0)
        of_tokens = torch.where(is_valid, of_tokens, -torch.inf)
    if teacher.shape[0] == 0:
        backend = "chunked"
    for i in range(iterations):
        of_prototypes = _merged(_lse(weight, teacher, of_tokens, scale, backend), group)
        of_prototypes = -math.log(weight.shape[0]) - of_prototypes
        if i + 1 < iterations:
            of_tokens = -_lse(teacher, weight, of_prototypes, scale, backend)
            if is_valid is not None:
                of_tokens = torch.where(is_valid, of_tokens, -torch.inf)
    return of_prototypes


def _lse(rows, columns, column_bias, scale, backend: str) -> Tensor:
    if backend == "reference":
        return (reference.prototype_logits(rows, columns, 1 / scale) + column_bias).logsumexp(1)
    return lse(rows, columns, column_bias, scale, backend)


@torch.no_grad()
def mean_prototype_logits(
    teacher: Tensor,  # (S, D), this rank's tokens
    teacher_weight: Tensor,  # (K, D), dtype of teacher; or float32 for a 16-bit teacher
    *,
    valid_count: Tensor | None = None,  # () int32 or int64
    weight_norm: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # (K,) float32; float64 for float64 inputs
    """Mean over tokens of teacher @ teacher_weight.T, no temperature; 0 without tokens.

    What DINO's centre moves towards. A mean of logits is the logit of the mean row, so 2 K D FLOPs
    after one pass over the tokens, and ranks exchange D + 1 numbers.

    Args:
        valid_count: The first this many rows count, whatever the others hold.
        weight_norm: Divide the rows of the weight by their norms first.
        group: Ranks whose tokens are averaged, each with as many as it has. None: this process
            alone. Every rank has to call.

    Raises:
        ValueError: A shape, dtype or device is wrong.
    """
    check_teacher(teacher, teacher_weight, valid_count)
    acc = torch.promote_types(teacher.dtype, torch.float32)
    count = torch.full((1,), teacher.shape[0], dtype=acc, device=teacher.device)
    is_valid = _is_valid(teacher, valid_count)
    if is_valid is not None:
        teacher, count = torch.where(is_valid[:, None], teacher, 0), is_valid.sum().to(acc)[None]
    total = torch.cat((teacher.sum(0, dtype=acc), count))
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    mean = total[:-1] / total[-1].clamp(min=1)
    weight = product_weight(teacher_weight, teacher.dtype, weight_norm)
    return torch.mv(weight.to(acc), mean)
