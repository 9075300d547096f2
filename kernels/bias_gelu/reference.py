"""Specification: the tanh form of GELU (arXiv:1606.08415, section 2) of h + b."""

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(
    h: Tensor,  # (T, M)
    bias: Tensor,  # (M,)
) -> Tensor:  # (T, M)
    return F.gelu(h + bias.to(h.dtype), approximate="tanh")
