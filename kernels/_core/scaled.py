"""Float32 gradients times a device scalar, rounded once: the last pass of a loss's backward."""

import torch
from torch import Tensor

from .backend import no_triton

# A kernel: torch's product of a float32 matrix and a scalar tensor into 16 bits runs at half the
# speed of memory.
torch.library.define(
    "siglip2::scaled", "(Tensor d, Tensor scale, ScalarType dtype, bool by_triton) -> Tensor"
)


@torch.library.impl("siglip2::scaled", "CompositeExplicitAutograd")
def _(d, scale, dtype, by_triton):
    out = torch.empty_like(d, dtype=dtype, memory_format=torch.contiguous_format)
    if not by_triton:
        return torch.mul(d, scale, out=out)
    from .scaled_triton import scaled

    scaled(d.contiguous(), scale, out)
    return out


@torch.library.register_fake("siglip2::scaled")
def _(d, scale, dtype, by_triton):
    return torch.empty_like(d, dtype=dtype, memory_format=torch.contiguous_format)


_scaled = torch.ops.siglip2.scaled.default


def scaled(d: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """d (...) times scale (), in their own dtype, then rounded to `dtype`."""
    is_float32 = d.dtype is scale.dtype is torch.float32
    return _scaled(d, scale, dtype, d.is_cuda and is_float32 and no_triton(d) is None)
