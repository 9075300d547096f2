"""Fused operations for training SigLIP 2. Importing this package is cheap and needs no Triton."""

from .bias_gelu import bias_gelu
from .linear_cross_entropy import LossAndStatistics, linear_cross_entropy
from .map_pool import map_pool
from .patch_embed import patch_embed
from .posemb_resample import posemb_resample
from .sigmoid_loss import pairwise_sigmoid_loss_sums, sigmoid_loss, sigmoid_loss_and_grads
from .varlen_attention import (
    VarlenPlan,
    make_plan,
    padded_attention,
    uniform_plan,
    varlen_attention,
    varlen_qkv_attention,
)

__all__ = [
    "bias_gelu",
    "LossAndStatistics",
    "VarlenPlan",
    "linear_cross_entropy",
    "make_plan",
    "map_pool",
    "padded_attention",
    "patch_embed",
    "posemb_resample",
    "pairwise_sigmoid_loss_sums",
    "sigmoid_loss",
    "sigmoid_loss_and_grads",
    "uniform_plan",
    "varlen_attention",
    "varlen_qkv_attention",
]
