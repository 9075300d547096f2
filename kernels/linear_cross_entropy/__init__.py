"""Cross entropy over a large vocabulary, from hidden states and the head's weight."""

from .loss import LossAndStatistics, linear_cross_entropy

__all__ = ["LossAndStatistics", "linear_cross_entropy"]
