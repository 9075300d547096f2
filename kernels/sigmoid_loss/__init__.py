"""Sigmoid image-text loss (SigLIP, arXiv:2303.15343) over all pairs, without the B x M matrix."""

from .loss import (
    LossAndGrads,
    LossSums,
    pairwise_sigmoid_loss_sums,
    sigmoid_loss,
    sigmoid_loss_and_grads,
)

__all__ = [
    "LossAndGrads",
    "LossSums",
    "pairwise_sigmoid_loss_sums",
    "sigmoid_loss",
    "sigmoid_loss_and_grads",
]
