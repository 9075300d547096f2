"""GELU of a product and its bias, as the MLP of a transformer block has it.

    y = gelu(h + b),   dh = dy gelu'(h + b),   db = sum_t dh_t

Bound by memory: 2 elements a value forward, 3 backward. The product h = x W^T comes from the
library without its bias, which costs nothing here.
"""

import torch
from torch import Tensor

from .._core.backend import Backend, choose, no_triton
from . import _chunked, reference

torch.library.define("siglip2::bias_gelu", "(Tensor h, Tensor bias, str backend) -> Tensor")
torch.library.define(
    "siglip2::bias_gelu_bwd",
    "(Tensor dy, Tensor h, Tensor bias, str backend) -> (Tensor dh, Tensor dbias)",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return _chunked


@torch.library.impl("siglip2::bias_gelu", "CompositeExplicitAutograd")
def _(h, bias, backend):
    if h.numel() == 0:
        return h.new_empty(h.shape)
    with torch.autocast(h.device.type, enabled=False):
        return _backend(backend).fwd(h.contiguous(), bias)


@torch.library.impl("siglip2::bias_gelu_bwd", "CompositeExplicitAutograd")
def _(dy, h, bias, backend):
    if h.numel() == 0:
        acc = torch.promote_types(h.dtype, torch.float32)
        return h.new_empty(h.shape), h.new_zeros(h.shape[1], dtype=acc)
    with torch.autocast(h.device.type, enabled=False):
        return _backend(backend).bwd(dy.contiguous(), h.contiguous(), bias)


@torch.library.register_fake("siglip2::bias_gelu")
def _(h, bias, backend):
    return h.new_empty(h.shape)


@torch.library.register_fake("siglip2::bias_gelu_bwd")
def _(dy, h, bias, backend):
    acc = torch.promote_types(h.dtype, torch.float32)
    return h.new_empty(h.shape), h.new_empty(h.shape[1], dtype=acc)


_fwd = torch.ops.siglip2.bias_gelu.default
_bwd = torch.ops.siglip2.bias_gelu_bwd.default


def _setup(ctx, inputs, output):
    h, bias, ctx.backend = inputs
    ctx.save_for_backward(h, bias)


def _grad(ctx, dy):
    h, bias = ctx.saved_tensors
    dh, dbias = _bwd(dy, h, bias, ctx.backend)
    return dh, dbias.to(bias.dtype), None


torch.library.register_autograd("siglip2::bias_gelu", _grad, setup_context=_setup)


def _unsupported(h: Tensor) -> dict[str, str | None]:
    triton = no_triton(h)
    if triton is None:
        triton = _backend("triton").unsupported(h)
    return {"triton": triton, "chunked": None, "reference": None}


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return _unsupported(torch.empty(256, 3072, dtype=dtype, device=device))


def bias_gelu(
    h: Tensor,  # (..., M)
    bias: Tensor,  # (M,)
    *,
    backend: Backend | None = None,
) -> Tensor:  # (..., M)
    """The tanh form of GELU of h + bias, in h's dtype; differentiable in both.

    On a GPU in float32 and rounded once; the bias's gradient is summed in float32. Deterministic.

    Raises:
        ValueError: A shape, dtype or device is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    if h.ndim < 1 or bias.ndim != 1 or bias.shape != h.shape[-1:]:
        got = f"{tuple(h.shape)}, {tuple(bias.shape)}"
        raise ValueError(f"need h (..., M) and bias (M,); got {got}")
    if not (h.is_floating_point() and bias.is_floating_point()):
        raise ValueError(f"need floats; got {h.dtype} and {bias.dtype}")
    if h.device != bias.device:
        raise ValueError(f"need h and bias on one device; got {h.device} and {bias.device}")
    name = choose(backend, _unsupported(h), h.device)
    if name == "reference":
        return reference.bias_gelu(h, bias)
    return _fwd(h.reshape(-1, bias.shape[0]), bias, name).view(h.shape)
