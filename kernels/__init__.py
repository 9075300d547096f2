"""Fused operations for training SigLIP 2. Importing this package is cheap and needs no Triton."""

from .bias_gelu import bias_gelu
from .fused_adamw import fused_adamw
from .linear_cross_entropy import LossAndStatistics, linear_cross_entropy
from .map_pool import map_pool
from .patch_embed import patch_embed
from .posemb_resample import posemb_resample
from .prototype_cross_entropy import (
    mean_prototype_logits,
    prototype_cross_entropy,
    sinkhorn_bias,
)
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
    "fused_adamw",
    "linear_cross_entropy",
    "make_plan",
    "map_pool",
    "mean_prototype_logits",
    "padded_attention",
    "patch_embed",
    "posemb_resample",
    "pairwise_sigmoid_loss_sums",
    "prototype_cross_entropy",
    "sigmoid_loss",
    "sigmoid_loss_and_grads",
    "sinkhorn_bias",
    "uniform_plan",
    "varlen_attention",
    "varlen_qkv_attention",
]
