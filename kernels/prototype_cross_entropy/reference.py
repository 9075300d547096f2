"""Specification of the prototype cross entropy: eager PyTorch, any device, any float dtype."""

import math

import torch
from torch import Tensor

from .._core.unit_rows import EPS


def prototype_logits(
    rows: Tensor,  # (T, D)
    weight: Tensor,  # (K, D)
    temp: float | Tensor,
    bias: Tensor | None = None,  # (K,)
    weight_norm: bool = False,
) -> Tensor:  # (T, K) float32, or float64
    acc = torch.promote_types(rows.dtype, torch.float32)
    if weight_norm:
        weight = weight.to(acc)
        weight = weight / (torch.linalg.vector_norm(weight, dim=1, keepdim=True) + EPS)
    z = rows.to(acc) @ weight.to(rows.dtype).to(acc).T / temp
    return z if bias is None else z + bias.to(acc)


def prototype_cross_entropy(
    student: Tensor,  # (T, D)
    student_weight: Tensor,  # (K, D)
    teacher: Tensor,  # (S, D)
    teacher_weight: Tensor,  # (K, D)
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    teacher_bias: Tensor | None = None,  # (K,)
    teacher_index: Tensor | None = None,  # (T,)
    token_weight: Tensor | None = None,  # (T,)
    valid_count: Tensor | None = None,  # ()
    weight_norm: bool = False,
) -> Tensor:  # ()
    """sum_t w_t (lse_t - sum_k P_tk s_tk): cross entropy of softmax(s) against P."""
    s = prototype_logits(student, student_weight, student_temp, weight_norm=weight_norm)
    with torch.no_grad():
        t = prototype_logits(teacher, teacher_weight, teacher_temp, teacher_bias, weight_norm)
        p = t.softmax(1)
        p = p if teacher_index is None else p.index_select(0, teacher_index)
    losses = s.logsumexp(1) - (p * s).sum(1)
    count = torch.as_tensor(len(s) if valid_count is None else valid_count, device=s.device)
    weight = 1 / count.clamp(min=1).to(s) if token_weight is None else token_weight
    counts = torch.arange(len(s), device=s.device) < count
    return torch.where(counts, losses * weight.to(losses), 0).sum()


def sinkhorn_probabilities(
    logits: Tensor,  # (T, K), all tokens of all ranks
    iterations: int = 3,
) -> Tensor:  # (T, K)
    """Sinkhorn-Knopp as DINOv2 has it: prototypes, then tokens, are scaled to equal shares."""
    q = (logits - logits.amax()).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def sinkhorn_bias(
    teacher: Tensor,  # (T, D)
    teacher_weight: Tensor,  # (K, D)
    *,
    teacher_temp: float | Tensor,
    iterations: int = 3,
    weight_norm: bool = False,
) -> Tensor:  # (K,)
    """b with softmax(logits + b) = sinkhorn_probabilities(logits)."""
    t = prototype_logits(teacher, teacher_weight, teacher_temp, weight_norm=weight_norm)
    of_tokens = t.new_zeros(len(t))
    for _ in range(iterations):
        of_prototypes = -math.log(t.shape[1]) - (t + of_tokens[:, None]).logsumexp(0)
        of_tokens = -(t + of_prototypes).logsumexp(1)
    return of_prototypes
