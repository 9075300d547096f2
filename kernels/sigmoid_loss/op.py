"""Sigmoid image-text loss over all B x M pairs (SigLIP, arXiv:2303.15343, section 3.2).

    z_ij = exp(log_scale) <img_i, txt_j> + bias
    loss = 1/B sum_ij w_i w'_j softplus(-y_ij z_ij),    y_ij = +1 for a positive pair, else -1
    G_ij = dl_ij/dz_ij,    dimg = scale G txt,    dtxt = scale G^T img

Loss and gradients come from one pass over row chunks of the logits: memory O(chunk M + (B + M) D)
instead of O(B M), 6 B M D FLOPs with all gradients, 4 with one tower's, 2 with none.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._core.backend import Backend, choose, no_triton
from . import _chunked, reference
from .inputs import Pairs, check

_TENSORS = (
    "Tensor img, Tensor txt, Tensor log_scale, Tensor bias, Tensor? img_ids, Tensor? txt_ids,"
    " Tensor? img_weight, Tensor? txt_weight"
)
# Gradients come back with the forward, in float32 and without temperature and reduction.
torch.library.define(
    "siglip2::sigmoid_loss",
    f"({_TENSORS}, bool needs_dimg, bool needs_dtxt, str backend)"
    " -> (Tensor totals, Tensor dimg, Tensor dtxt)",
)
torch.library.define(
    "siglip2::sigmoid_loss_sums", f"({_TENSORS}, str backend) -> (Tensor rows, Tensor columns)"
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return _chunked


@torch.library.impl("siglip2::sigmoid_loss", "CompositeExplicitAutograd")
def _(img, txt, log_scale, bias, *args):
    *args, backend = args
    with torch.autocast(img.device.type, enabled=False):
        return _backend(backend).fwd(img, txt, log_scale, bias, *args)


@torch.library.impl("siglip2::sigmoid_loss_sums", "CompositeExplicitAutograd")
def _(img, txt, log_scale, bias, *args):
    *args, backend = args
    with torch.autocast(img.device.type, enabled=False):
        return _backend(backend).sums(img, txt, log_scale, bias, *args)


@torch.library.register_fake("siglip2::sigmoid_loss")
def _(img, txt, log_scale, bias, ii, ti, iw, tw, needs_dimg, needs_dtxt, backend):
    acc = torch.promote_types(img.dtype, torch.float32)
    dimg = img.new_empty((img.shape[0] if needs_dimg else 0, img.shape[1]), dtype=acc)
    dtxt = txt.new_empty((txt.shape[0] if needs_dtxt else 0, txt.shape[1]), dtype=acc)
    return img.new_empty(3, dtype=acc), dimg, dtxt


@torch.library.register_fake("siglip2::sigmoid_loss_sums")
def _(img, txt, log_scale, bias, ii, ti, iw, tw, backend):
    acc = torch.promote_types(img.dtype, torch.float32)
    return img.new_empty(img.shape[0], dtype=acc), txt.new_empty(txt.shape[0], dtype=acc)


_fwd = torch.ops.siglip2.sigmoid_loss.default
_sums = torch.ops.siglip2.sigmoid_loss_sums.default


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, img, txt, log_scale, bias, factor, pairs, needs, backend):
        totals, dimg, dtxt = _fwd(img, txt, log_scale, bias, *pairs, *needs, backend)
        ctx.save_for_backward(dimg, dtxt, totals, log_scale, factor)
        ctx.needs, ctx.dtypes = needs, (img.dtype, log_scale.dtype, bias.dtype)
        return totals[0] * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dimg, dtxt, totals, log_scale, factor = ctx.saved_tensors
        dtype, log_scale_dtype, bias_dtype = ctx.dtypes
        dz = dloss * factor
        draw = dz * log_scale.to(dz.dtype).exp()
        # out= scales and rounds in one pass; a loss scaler's factor arrives before the rounding.
        dimg, dtxt = (
            torch.mul(x, draw, out=torch.empty_like(x, dtype=dtype)) if needed else None
            for x, needed in zip((dimg, dtxt), ctx.needs, strict=True)
        )
        dlog_scale = (totals[1] * draw).to(log_scale_dtype)
        return dimg, dtxt, dlog_scale, (totals[2] * dz).to(bias_dtype), *(None,) * 4


def _unsupported(img: Tensor, txt: Tensor) -> dict[str, str | None]:
    triton = no_triton(img)
    if triton is None:
        triton = _backend("triton").unsupported(img, txt)
    cuda = "there is no CUDA C++ kernel of this op"
    return {"cuda": cuda, "triton": triton, "chunked": None, "reference": None}


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.empty(128, 768, dtype=dtype, device=device)
    return _unsupported(x, x)


def sigmoid_loss(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    img_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ids: Tensor | None = None,  # (M,) int32 or int64
    img_weight: Tensor | None = None,  # (B,)
    txt_weight: Tensor | None = None,  # (M,)
    reduction: Literal["mean", "sum"] = "mean",
    backend: Backend | None = None,
) -> Tensor:  # (), float32; float64 for float64 inputs
    """Sigmoid loss summed over all pairs; "mean" divides by B, the images, not by B M.

    Args:
        img: Unit vectors, as is `txt`; nothing is normalised here.
        log_scale: Logarithm of the temperature that multiplies the dot products.
        img_ids: A pair whose ids are equal is a positive. None, for both ids: B == M and the
            positives are i <-> i.
        img_weight: Factor on all pairs of an image; no gradient flows to weights.
        backend: None takes the fastest that supports the input, "chunked" on the CPU.

    Differentiable once in img, txt, log_scale and bias; 0 for an empty batch. Accumulates in
    float32, deterministic. Gradients have their inputs' dtypes.

    Raises:
        ValueError: A shape, dtype or device is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"need reduction 'mean' or 'sum'; got {reduction!r}")
    pairs = Pairs(img_ids, txt_ids, img_weight, txt_weight)
    check(img, txt, log_scale, bias, pairs)
    name = choose(backend, _unsupported(img, txt), img.device)
    if name == "reference" or img.shape[0] == 0 or txt.shape[0] == 0:
        with torch.autocast(img.device.type, enabled=False):
            return reference.sigmoid_loss(
                img, txt, log_scale, bias, reduction=reduction, **pairs._asdict()
            )
    pairs, factor = pairs.with_unit_weights(img)
    if reduction == "mean":
        factor = factor / img.shape[0]
    grad = torch.is_grad_enabled()
    needs = (grad and img.requires_grad, grad and txt.requires_grad)
    return _SigmoidLoss.apply(img, txt, log_scale, bias, factor, pairs, needs, name)


class LossSums(NamedTuple):
    """Each image's and each caption's share of the loss, without a reduction."""

    rows: Tensor  # (B,)
    columns: Tensor  # (M,)


@torch.no_grad()
def pairwise_sigmoid_loss_sums(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    img_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ids: Tensor | None = None,  # (M,) int32 or int64
    img_weight: Tensor | None = None,  # (B,)
    txt_weight: Tensor | None = None,  # (M,)
    backend: Backend | None = None,
) -> LossSums:  # (B,), (M,), float32; float64 for float64 inputs
    """Weighted pair losses summed over captions and over images, for curation and logging.

    Arguments and errors are those of `sigmoid_loss`, whose "sum" is the sum of either output. No
    gradient.
    """
    pairs = Pairs(img_ids, txt_ids, img_weight, txt_weight)
    check(img, txt, log_scale, bias, pairs)
    name = choose(backend, _unsupported(img, txt), img.device)
    if name == "reference" or img.shape[0] == 0 or txt.shape[0] == 0:
        with torch.autocast(img.device.type, enabled=False):
            sums = reference.pairwise_sigmoid_loss_sums(
                img, txt, log_scale, bias, **pairs._asdict()
            )
        return LossSums(*sums)
    pairs, factor = pairs.with_unit_weights(img)
    rows, columns = _sums(img, txt, log_scale, bias, *pairs, name)
    return LossSums(rows * factor, columns * factor)
