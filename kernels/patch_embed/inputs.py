"""What `patch_embed` accepts."""

import torch
from torch import Tensor


def check(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor,
    posemb: Tensor | None,
    mask: Tensor | None,
    mask_token: Tensor | None,
) -> None:
    """Raises ValueError."""
    if patches.ndim != 2 or weight.ndim != 2 or patches.shape[1] != weight.shape[1]:
        got = f"{tuple(patches.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"need patches (T, K), weight (D, K) with one K = P*P*C; got {got}")
    if patches.dtype is not torch.uint8 and not patches.dtype.is_floating_point:
        raise ValueError(f"need patches of uint8 or a floating-point dtype; got {patches.dtype}")
    if (mask is None) != (mask_token is None):
        raise ValueError("need both mask and mask_token, or neither; got one")
    T, D = patches.shape[0], weight.shape[0]
    shapes = {"bias": (bias, (D,)), "posemb": (posemb, (T, D)), "mask_token": (mask_token, (D,))}
    for name, (x, shape) in shapes.items():
        if x is not None and (x.shape != shape or not x.is_floating_point()):
            raise ValueError(f"need {name} {shape} of floats; got {tuple(x.shape)} {x.dtype}")
    if mask is not None and (mask.shape != (T,) or mask.dtype is not torch.bool):
        raise ValueError(f"need mask ({T},) of bool; got {tuple(mask.shape)} {mask.dtype}")
    for name, x in (("weight", weight), ("mask", mask), *((n, x) for n, (x, _) in shapes.items())):
        if x is not None and x.device != patches.device:
            raise ValueError(
                f"need all tensors on the patches' device, {patches.device};"
                f" {name} is on {x.device}"
            )
