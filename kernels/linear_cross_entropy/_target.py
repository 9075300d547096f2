"""What each token's target contributes, outside of any tile."""

import torch
from torch import Tensor

_ROWS = 4096  # gathered at a time


def target_logits(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (T,) int64
    softcap: float | None,
) -> Tensor:  # (T,) float32
    z = torch.empty(len(target), dtype=torch.float32, device=x.device)
    for start in range(0, len(target), _ROWS):
        part = slice(start, start + _ROWS)
        words = weight.index_select(0, target[part]).float()
        torch.sum(words.mul_(x[part]), 1, out=z[part])
    if bias is not None:
        z += bias.float().index_select(0, target)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def patch_of_target(
    z: Tensor,  # (n,) the target's logit
    against: Tensor,  # (n,) log((1 - p) / p) of its probability p
    hit: Tensor,  # (n,) what is taken from p
    scale: Tensor,  # (n,) softmax over E
    softcap: float | None,
) -> Tensor:  # (n,)
    """E at the target such that scale * E is p - hit, times the cap's slope."""
    patch = ((1 - hit) - torch.sigmoid(against)) / scale
    if softcap is None:
        return patch
    t = z / softcap
    return patch * (1 - t) * (1 + t)
