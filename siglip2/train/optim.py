"""AdamW over the parameters that the published recipe decays, and those that it does not."""

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


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, torch's or ours; each group keeps its peak rate under "peak_lr"."""
    groups = _groups(model, config)
    # torch's eps, 1e-8: none is published
    rules = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": 1e-8}
    if config.name == "fused_adamw":
        return FusedAdamW(groups, **rules)
    return torch.optim.AdamW(groups, **rules, fused=True)


def add_parameters(
    optimizer: torch.optim.Optimizer, module: nn.Module, config: OptimConfig
) -> None:
    """Train `module` as well, from now on; the state of all others stays as it is."""
    for group in _groups(module, config):
        optimizer.add_param_group(group)


def _groups(module: nn.Module, config: OptimConfig) -> list[dict]:
    return [
        {**group, "peak_lr": config.lr} for group in parameter_groups(module, config.weight_decay)
    ]
