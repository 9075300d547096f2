"""Specification of the linear cross entropy: eager PyTorch, any device, any float dtype."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class TokenTerms(NamedTuple):
    """What each token contributes, whether it counts or not."""

    losses: Tensor  # (T,)
    lse: Tensor  # (T,) log sum of exponentials of the logits
    is_best: Tensor  # (T,) bool: no other logit is larger than the target's


def token_terms(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,), all within [0, V)
    *,
    bias: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> TokenTerms:
    """lse - (1 - s) z_target - s mean(z) + z_loss lse^2, with s the label smoothing."""
    acc = torch.promote_types(x.dtype, torch.float32)
    z = x.to(acc) @ weight.to(x.dtype).to(acc).T  # (T, V)
    if bias is not None:
        z = z + bias.to(acc)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(1)
    z_target = z.gather(1, target[:, None])[:, 0]
    losses = lse - (1 - label_smoothing) * z_target + z_loss * lse.square()
    if label_smoothing:
        losses = losses - label_smoothing * z.mean(1)
    return TokenTerms(losses, lse.detach(), (z_target >= z.amax(1)).detach())


def linear_cross_entropy(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    *,
    token_weight: Tensor | None = None,  # (T,)
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Tensor | float | None,  # as in token_terms
) -> Tensor:  # (), or (T,) for "none"
    """ "mean" divides by the weights of the tokens that count; 0 when they sum to 0."""
    counts = target != ignore_index
    losses = token_terms(x, weight, torch.where(counts, target, 0).long(), **options).losses
    token_weight = torch.ones_like(losses) if token_weight is None else token_weight.to(losses)
    token_weight = torch.where(counts, token_weight, 0)
    losses = token_weight * losses
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = token_weight.sum()
    return losses.sum() / torch.where(total == 0, 1, total)
