"""AdamW over the parameters that the published recipe decays, and those that it does not."""

from typing import Literal

import torch
from torch import nn

from ..config import OptimConfig
from ..models.layers import Linear
from .fused_adamw import FusedAdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights of linear layers decay.

    Embeddings, positions, probes, norms, biases and scalars do not.
    This is big_vision's `.*/kernel$` (SigLIP 2, section 2.1).
    """
    decayed = {
        id(module.weight): module.weight for module in model.modules() if isinstance(module, Linear)
    }
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in decayed]
    kernels = [p for p in decayed.values() if p.requires_grad]
    return [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    config: OptimConfig,
    *,
    name: Literal["adamw", "fused_adamw"] = "adamw",
) -> torch.optim.AdamW:
    """Fused AdamW, torch's or ours; each group keeps its peak rate under "peak_lr"."""
    groups = parameter_groups(model, config.weight_decay)
    for group in groups:
        group["peak_lr"] = config.lr
    # torch's eps, 1e-8: none is published
    rules = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": 1e-8}
    if name == "fused_adamw":
        return FusedAdamW(groups, **rules)
    return torch.optim.AdamW(groups, **rules, fused=True)
