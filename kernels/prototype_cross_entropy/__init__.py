"""Cross entropy of a student against a teacher over prototypes, and the teacher's balancing."""

from .loss import prototype_cross_entropy
from .sinkhorn import mean_prototype_logits, sinkhorn_bias

__all__ = ["mean_prototype_logits", "prototype_cross_entropy", "sinkhorn_bias"]
