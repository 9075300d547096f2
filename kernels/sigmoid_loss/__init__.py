"""Sigmoid image-text loss (SigLIP, arXiv:2303.15343) over all pairs, without the B x M matrix."""

from .op import LossSums, pairwise_sigmoid_loss_sums, sigmoid_loss

__all__ = ["LossSums", "pairwise_sigmoid_loss_sums", "sigmoid_loss"]
