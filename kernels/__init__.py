"""Fused operations for training SigLIP 2. Importing this package is cheap and needs no Triton."""

from .sigmoid_loss import pairwise_sigmoid_loss_sums, sigmoid_loss

__all__ = ["pairwise_sigmoid_loss_sums", "sigmoid_loss"]
