"""Sigmoid image-text loss over all B x M pairs (SigLIP, arXiv:2303.15343, section 3.2).

    z_ij = exp(log_scale) <img_i, txt_j> + bias
    loss = 1/B sum_ij w_i w'_j softplus(-y_ij z_ij),    y_ij = +1 for a positive pair, else -1
    G_ij = dl_ij/dz_ij,    dimg = scale G txt,    dtxt = scale G^T img

Loss and gradients come from one pass over row chunks of the logits: memory O(chunk M + (B + M) D)
instead of O(B M), 6 B M D FLOPs with all gradients, 4 with one tower's, 2 with none. Normalised
inputs become unit rows before that pass, and gradients come back through the norm after it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.backend import choose, no_triton
from .._core.scaled import scaled
from .._core.unit_rows import unit_dtype, unit_rows, unit_rows_grad
from . import _chunked, dispatch
from .inputs import Pairs, check

_TENSORS = (
    "Tensor img, Tensor txt, Tensor log_scale, Tensor bias, Tensor? img_ids, Tensor? txt_ids,"
    " Tensor? img_ignore_ids, Tensor? txt_ignore_ids, Tensor? img_weight, Tensor? txt_weight"
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
torch.library.define("siglip2::unit_rows", "(Tensor x, str backend) -> Tensor")
torch.library.define(
    "siglip2::unit_rows_grad",
    "(Tensor d, Tensor x, Tensor scale, ScalarType dtype, str backend) -> Tensor",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    if name == "cublas":
        from . import _cublas

        return _cublas
    return _chunked


def _without_autocast(name: str, fn) -> None:
    def call(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args)

    torch.library.impl(f"siglip2::{name}", "CompositeExplicitAutograd")(call)


_without_autocast("sigmoid_loss", lambda *args: _backend(args[-1]).fwd(*args[:-1]))
_without_autocast("sigmoid_loss_sums", lambda *args: _backend(args[-1]).sums(*args[:-1]))
_without_autocast("unit_rows", unit_rows)
_without_autocast("unit_rows_grad", unit_rows_grad)


@torch.library.register_fake("siglip2::sigmoid_loss")
def _(img, txt, log_scale, bias, ii, ti, igi, igt, iw, tw, needs_dimg, needs_dtxt, backend):
    acc = torch.promote_types(img.dtype, torch.float32)
    dimg = img.new_empty((img.shape[0] if needs_dimg else 0, img.shape[1]), dtype=acc)
    dtxt = txt.new_empty((txt.shape[0] if needs_dtxt else 0, txt.shape[1]), dtype=acc)
    return img.new_empty(3, dtype=acc), dimg, dtxt


@torch.library.register_fake("siglip2::sigmoid_loss_sums")
def _(img, txt, *args):
    acc = torch.promote_types(img.dtype, torch.float32)
    return img.new_empty(img.shape[0], dtype=acc), txt.new_empty(txt.shape[0], dtype=acc)


@torch.library.register_fake("siglip2::unit_rows")
def _(x, backend):
    return x.new_empty(x.shape, dtype=unit_dtype(x.dtype))


@torch.library.register_fake("siglip2::unit_rows_grad")
def _(d, x, scale, dtype, backend):
    return d.new_empty(d.shape, dtype=dtype)


fwd = torch.ops.siglip2.sigmoid_loss.default
sums = torch.ops.siglip2.sigmoid_loss_sums.default
_unit_rows = torch.ops.siglip2.unit_rows.default
_unit_rows_grad = torch.ops.siglip2.unit_rows_grad.default


def _unsupported(img: Tensor, txt: Tensor) -> dict[str, str | None]:
    first = dispatch.preferred(img)
    reasons = {"cuda": "there is no CUDA C++ kernel of this op"}
    for name in (first, "cublas" if first == "triton" else "triton"):
        reasons[name] = no_triton(img)
        if reasons[name] is None:
            reasons[name] = _backend(name).unsupported(img, txt)
    return reasons | {"chunked": None, "reference": None}


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.empty(128, 768, dtype=dtype, device=device)
    return _unsupported(x, x)


class Plan(NamedTuple):
    """What runs, on what, and what is applied around it."""

    backend: str
    rows_backend: str | None  # makes unit rows; None: rows are multiplied as they come
    img: Tensor  # (B, D) as multiplied
    txt: Tensor  # (M, D) as multiplied
    pairs: Pairs  # weights over their maxima
    factor: Tensor  # (), the maxima and the reduction


def make_plan(img, txt, log_scale, bias, pairs, *, normalize, reduction, backend) -> Plan:
    """Raises ValueError and NotImplementedError as `sigmoid_loss` says."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"need reduction 'mean' or 'sum'; got {reduction!r}")
    check(img, txt, log_scale, bias, pairs)
    rows, rows_backend = (img.detach(), txt.detach()), None
    if normalize:
        wants_triton = img.is_cuda if backend is None else backend in ("triton", "cublas")
        can = no_triton(img) is None and img.dtype.itemsize <= 4
        rows_backend = "triton" if wants_triton and can else "eager"
        rows = tuple(_unit_rows(x, rows_backend) for x in rows)
    backend = choose(backend, _unsupported(*rows), img.device)
    if img.shape[0] == 0 or txt.shape[0] == 0:
        backend = "reference"
    pairs, factor = (pairs, None) if backend == "reference" else pairs.with_unit_weights(img)
    if reduction == "mean" and factor is not None:
        factor = factor / img.shape[0]
    return Plan(backend, rows_backend, *rows, pairs, factor)


def grad_of_rows(
    rows_backend: str | None,
    d: Tensor,  # (B, D) float32 or float64, gradient of the rows as multiplied
    x: Tensor,  # (B, D) as it came
    scale: Tensor,  # ()
    dtype: torch.dtype,
) -> Tensor:  # (B, D) of `dtype`
    """scale * d with respect to x, through its normalisation if there was one; rounded once."""
    if rows_backend is None:
        return scaled(d, scale, dtype)
    return _unit_rows_grad(d, x, scale, dtype, rows_backend)


class SigmoidLoss(torch.autograd.Function):
    """Saves float32 gradients of both inputs, (B + M) D; normalised inputs as well."""

    @staticmethod
    def forward(ctx, img, txt, log_scale, bias, plan, needs):
        totals, *grads = fwd(plan.img, plan.txt, log_scale, bias, *plan.pairs, *needs, plan.backend)
        ctx.rows_backend, ctx.needs = plan.rows_backend, needs
        ctx.dtypes = img.dtype, log_scale.dtype, bias.dtype
        rows = (None, None) if plan.rows_backend is None else (img, txt)
        ctx.save_for_backward(*grads, *rows, totals, log_scale, plan.factor)
        return totals[0] * plan.factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dimg, dtxt, img, txt, totals, log_scale, factor = ctx.saved_tensors
        dtype, log_scale_dtype, bias_dtype = ctx.dtypes
        # A loss scaler's factor arrives before the rounding.
        dz = dloss * factor
        draw = dz * log_scale.to(dz.dtype).exp()
        rows = zip((dimg, dtxt), (img, txt), ctx.needs, strict=True)
        dimg, dtxt = (
            grad_of_rows(ctx.rows_backend, d, x, draw, dtype) if needed else None
            for d, x, needed in rows
        )
        dlog_scale = (totals[1] * draw).to(log_scale_dtype)
        return dimg, dtxt, dlog_scale, (totals[2] * dz).to(bias_dtype), None, None
