"""Packed patches to tokens (SigLIP 2's patch embedding; masked patches: TIPS, arXiv:2410.16512).

    y_t = W x_t + b, or the mask token where patch t is masked;    out_t = y_t + posemb_t
    bytes:  x = u / 127.5 - 1 = (2 u - 255) / 255

2 u - 255 is exact in bfloat16, so bytes lose nothing, and a quarter of the memory of float32
patches crosses to the device. 2 T K D FLOPs forward, as many for the weight's gradient.
"""

import torch
from torch import Tensor

from .._core.backend import Backend, choose, no_triton
from . import _chunked, reference
from .inputs import check

torch.library.define(
    "siglip2::patch_embed",
    "(Tensor patches, Tensor weight, Tensor bias, Tensor? posemb, Tensor? mask,"
    " Tensor? mask_token, ScalarType dtype, str backend) -> Tensor",
)
torch.library.define(
    "siglip2::patch_embed_bwd",
    "(Tensor dout, Tensor patches, Tensor weight, Tensor? mask, bool needs_dpatches,"
    " bool needs_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return _chunked


@torch.library.impl("siglip2::patch_embed", "CompositeExplicitAutograd")
def _(patches, weight, bias, posemb, mask, mask_token, dtype, backend):
    if patches.shape[0] == 0:
        return patches.new_empty(0, weight.shape[0], dtype=dtype)
    with torch.autocast(patches.device.type, enabled=False):
        args = (patches, weight, bias, posemb, mask, mask_token)
        args = (None if x is None else x.contiguous() for x in args)
        return _backend(backend).fwd(*args, dtype)


@torch.library.impl("siglip2::patch_embed_bwd", "CompositeExplicitAutograd")
def _(dout, patches, weight, mask, needs_dpatches, needs_dweight):
    with torch.autocast(dout.device.type, enabled=False):
        return _chunked.bwd(dout, patches, weight, mask, needs_dpatches, needs_dweight)


@torch.library.register_fake("siglip2::patch_embed")
def _(patches, weight, bias, posemb, mask, mask_token, dtype, backend):
    return patches.new_empty(patches.shape[0], weight.shape[0], dtype=dtype)


@torch.library.register_fake("siglip2::patch_embed_bwd")
def _(dout, patches, weight, mask, needs_dpatches, needs_dweight):
    (T, K), D = patches.shape, weight.shape[0]
    acc = torch.promote_types(dout.dtype, torch.float32)
    dpatches = patches.new_empty(T if needs_dpatches else 0, K)
    dweight = weight.new_empty(D if needs_dweight else 0, K, dtype=acc)
    return dpatches, dweight, dout.new_empty(D, dtype=acc), dout.new_empty(D, dtype=acc)


_fwd = torch.ops.siglip2.patch_embed.default
_bwd = torch.ops.siglip2.patch_embed_bwd.default


def _setup(ctx, inputs, output):
    patches, weight, bias, posemb, mask, mask_token, *_ = inputs
    ctx.save_for_backward(patches, weight, mask)
    ctx.dtypes = [None if x is None else x.dtype for x in (bias, posemb, mask_token)]


def _grad(ctx, dout):
    patches, weight, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dpatches, dweight, dbias, dtoken = _bwd(dout, patches, weight, mask, needs[0], needs[1])
    bias_dtype, posemb_dtype, token_dtype = ctx.dtypes
    return (
        dpatches if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias_dtype) if needs[2] else None,
        dout.to(posemb_dtype) if needs[3] else None,
        None,
        dtoken.to(token_dtype) if needs[5] else None,
        None,
        None,
    )


torch.library.register_autograd("siglip2::patch_embed", _grad, setup_context=_setup)


def _unsupported(patches: Tensor, weight: Tensor) -> dict[str, str | None]:
    triton = no_triton(patches)
    if triton is None:
        triton = _backend("triton").unsupported(patches, weight)
    cuda = "there is no CUDA C++ kernel of this op"
    return {"cuda": cuda, "triton": triton, "chunked": None, "reference": None}


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    patches = torch.empty(256, 768, dtype=torch.uint8, device=device)
    return _unsupported(patches, torch.empty(768, 768, device=device))


def patch_embed(
    patches: Tensor,  # (T, P*P*C) uint8 or float
    weight: Tensor,  # (D, P*P*C)
    bias: Tensor,  # (D,)
    *,
    posemb: Tensor | None = None,  # (T, D)
    mask: Tensor | None = None,  # (T,) bool
    mask_token: Tensor | None = None,  # (D,)
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (T, D)
    """Tokens of packed patches; differentiable in all but bytes and the mask.

    Args:
        patches: Bytes mean x / 127.5 - 1; floats are taken as they are.
        posemb: Added to every token, masked ones included.
        mask: True replaces a patch's projection by `mask_token`.
        dtype: Of the result and of the product's operands, float32 sums; None: the patches', or
            the weight's for bytes.

    Gradients of weight, bias and mask token are summed in float32. Deterministic.

    Raises:
        ValueError: A shape, dtype or device is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    check(patches, weight, bias, posemb, mask, mask_token)
    if dtype is None:
        dtype = weight.dtype if patches.dtype is torch.uint8 else patches.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"need a floating-point dtype; got {dtype}")
    name = choose(backend, _unsupported(patches, weight), patches.device)
    if name == "reference":
        return reference.patch_embed(
            patches, weight, bias, posemb=posemb, mask=mask, mask_token=mask_token, dtype=dtype
        )
    return _fwd(patches, weight, bias, posemb, mask, mask_token, dtype, name)
