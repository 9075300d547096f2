"""Per op, which backend runs on a device and why: the body of `siglip2 env`."""

import torch

from ._core.backend import Choice, explain
from .bias_gelu import op as bias_gelu
from .fused_adamw import op as fused_adamw
from .linear_cross_entropy import op as linear_cross_entropy
from .map_pool import op as map_pool
from .patch_embed import op as patch_embed
from .posemb_resample import op as posemb_resample
from .prototype_cross_entropy import op as prototype_cross_entropy
from .sigmoid_loss import op as sigmoid_loss
from .varlen_attention import op as varlen_attention

# Each module has probe(device): backend -> reason for not taking a typical input, None if it does.
_OPS = {
    "sigmoid_loss": sigmoid_loss,
    "linear_cross_entropy": linear_cross_entropy,
    "prototype_cross_entropy": prototype_cross_entropy,
    "varlen_attention": varlen_attention,
    "map_pool": map_pool,
    "posemb_resample": posemb_resample,
    "patch_embed": patch_embed,
    "bias_gelu": bias_gelu,
    "fused_adamw": fused_adamw,
}


def report(device: torch.device | str | None = None) -> list[Choice]:
    """One `Choice` per op; str() of it is a line to print.

    Args:
        device: None takes CUDA when there is one, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return [explain(name, op.probe(device), device) for name, op in _OPS.items()]
