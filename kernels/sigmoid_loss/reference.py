"""Specification of the sigmoid loss: eager PyTorch, any device, any float dtype, autograd."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.unit_rows import EPS


def weighted_pair_losses(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    img_ids: Tensor | None = None,  # (B,)
    txt_ids: Tensor | None = None,  # (M,)
    img_ignore_ids: Tensor | None = None,  # (B,)
    txt_ignore_ids: Tensor | None = None,  # (M,)
    img_weight: Tensor | None = None,  # (B,)
    txt_weight: Tensor | None = None,  # (M,)
    normalize: bool = False,
) -> Tensor:  # (B, M)
    """w_i w'_j softplus(-y_ij z_ij), with y_ij = +1 where ids are equal (i == j without ids).

    0 where y_ij = -1 and ignore ids are equal.
    """
    acc = torch.promote_types(img.dtype, torch.float32)
    img, txt = img.to(acc), txt.to(acc)
    if normalize:
        img, txt = (x / (x.norm(dim=-1, keepdim=True) + EPS) for x in (img, txt))
    z = log_scale.to(acc).exp() * (img @ txt.T) + bias.to(acc)  # (B, M)
    if img_ids is None:
        img_ids = torch.arange(img.shape[0], device=img.device)
        txt_ids = torch.arange(txt.shape[0], device=img.device)
    is_positive = img_ids[:, None] == txt_ids
    # The default threshold of 20 cuts off terms that float64 resolves.
    losses = F.softplus(torch.where(is_positive, -z, z), threshold=40)
    if img_ignore_ids is not None:
        is_ignored = (img_ignore_ids[:, None] == txt_ignore_ids) & ~is_positive
        losses = losses.masked_fill(is_ignored, 0)
    if img_weight is not None:
        losses = img_weight.to(acc)[:, None] * losses
    if txt_weight is not None:
        losses = losses * txt_weight.to(acc)
    return losses


def sigmoid_loss(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    reduction: Literal["mean", "sum"] = "mean",
    **pairs: Tensor | bool | None,  # as in weighted_pair_losses
) -> Tensor:  # ()
    """Sum over all pairs; "mean" divides by B, the images, not by the pairs."""
    total = weighted_pair_losses(img, txt, log_scale, bias, **pairs).sum()
    return total / max(img.shape[0], 1) if reduction == "mean" else total


def pairwise_sigmoid_loss_sums(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    **pairs: Tensor | bool | None,  # as in weighted_pair_losses
) -> tuple[Tensor, Tensor]:  # (B,), (M,)
    losses = weighted_pair_losses(img, txt, log_scale, bias, **pairs)
    return losses.sum(1), losses.sum(0)
