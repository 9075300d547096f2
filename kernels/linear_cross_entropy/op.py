"""Cross entropy of a linear layer's outputs over a large vocabulary, without its logits.

    z_tv = <x_t, weight_v> + bias_v,    then softcap tanh(z / softcap) if there is a cap
    lse_t = log sum_v exp z_tv
    loss_t = lse_t - (1 - s) z_t,target - s mean_v z_tv + z_loss lse_t^2
    dl_t/dz_tv = p_tv (1 + 2 z_loss lse_t) - (1 - s) [v = target_t] - s / V

Losses and gradients come from one pass over chunks of tokens: memory O(chunk V + (T + V) D) instead
of O(T V), 6 T V D FLOPs with both gradients, 4 with one, 2 with none.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.backend import choose, no_triton
from .._core.scaled import scaled
from . import _chunked, dispatch
from .inputs import Options, Weights, check, check_options, weigh

# Gradients are of sum_t row_weight_t loss_t, in float32, and come back with the forward.
torch.library.define(
    "siglip2::linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor row_weight,"
    " float label_smoothing, float z_loss, float? softcap, int? chunk_tokens,"
    " bool needs_dx, bool needs_dweight, bool needs_dbias, bool wants_accuracy, str backend)"
    " -> (Tensor losses, Tensor lse, Tensor is_best, Tensor dx, Tensor dweight, Tensor dbias)",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    if name == "cublas":
        from . import _cublas

        return _cublas
    return _chunked


@torch.library.impl("siglip2::linear_cross_entropy", "CompositeExplicitAutograd")
def _(x, *args):
    *args, backend = args
    with torch.autocast(x.device.type, enabled=False):
        return _backend(backend).fwd(x, *args)


@torch.library.register_fake("siglip2::linear_cross_entropy")
def _(x, weight, target, bias, row_weight, s, z, c, n, *needs):
    needs_dx, needs_dweight, needs_dbias, wants_accuracy, _ = needs
    (T, D), V = x.shape, weight.shape[0]
    new = row_weight.new_empty
    is_best = new(T if wants_accuracy else 0, dtype=torch.bool)
    dx, dweight = new(T if needs_dx else 0, D), new(V if needs_dweight else 0, D)
    return new(T), new(T), is_best, dx, dweight, new(V if needs_dbias else 0)


fwd = torch.ops.siglip2.linear_cross_entropy.default


def _unsupported(
    x: Tensor, weight: Tensor, options: Options, has_buffer: bool = False
) -> dict[str, str | None]:
    first = dispatch.preferred(x)
    reasons = {"cuda": "there is no CUDA C++ kernel of this op"}
    for name in (first, "cublas" if first == "triton" else "triton"):
        reasons[name] = no_triton(x)
        if reasons[name] is None:
            smoothing, softcap = options.label_smoothing, options.softcap
            reasons[name] = _backend(name).unsupported(x, weight, smoothing, softcap)
    reasons["chunked"] = None
    reasons["reference"] = None
    if has_buffer:
        reasons["reference"] = "autograd makes its gradients, so weight_grad_out cannot take them"
    return reasons


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.empty(128, 768, dtype=dtype, device=device)
    return _unsupported(x, x, Options(0.0, 0.0, None, None))


class Plan(NamedTuple):
    """What runs, and what is applied around it."""

    backend: str
    weights: Weights
    options: Options
    wants_accuracy: bool


def make_plan(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    options: Options,
    valid_index: Tensor | None,
    weight_grad_out: Tensor | None,
    wants_accuracy: bool,
    backend: str | None,
) -> tuple[Tensor, Plan]:  # (n, D) rows of x that run
    """Raises ValueError and NotImplementedError as `linear_cross_entropy` says."""
    check_options(options, reduction)
    check(x, weight, target, bias, token_weight, valid_index, weight_grad_out)
    reasons = _unsupported(x, weight, options, weight_grad_out is not None)
    backend = choose(backend, reasons, x.device)
    if valid_index is not None:
        x, target = x.index_select(0, valid_index), target.index_select(0, valid_index)
        if token_weight is not None:
            token_weight = token_weight.index_select(0, valid_index)
    if x.shape[0] == 0 and backend != "reference":
        backend = "chunked"
    weights = weigh(x, target, token_weight, ignore_index, reduction)
    return x, Plan(backend, weights, options, wants_accuracy)


def _run(x, weight, bias, plan: Plan, row_weight: Tensor, needs: tuple[bool, bool, bool]):
    # The chunked backend converts a weight block by block.
    weight = weight if plan.backend == "chunked" else weight.to(x.dtype)
    wants = (*needs, plan.wants_accuracy)
    return fwd(
        x, weight, plan.weights.target, bias, row_weight, *plan.options, *wants, plan.backend
    )


def _finish(ctx, grads: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias: scaled in float32, rounded once."""
    needs_dx, needs_dweight, needs_dbias = ctx.needs
    if ctx.weight_grad_out is not None:
        ctx.weight_grad_out.addcmul_(grads[1], scale)
        needs_dweight = False
    return tuple(
        scaled(d, scale, dtype) if needed else None
        for d, dtype, needed in zip(
            grads, ctx.dtypes, (needs_dx, needs_dweight, needs_dbias), strict=True
        )
    )


def _remember(ctx, x, weight, bias, weight_grad_out, needs) -> None:
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    # An attribute: saved for the backward, its growth by another backward would be an error.
    ctx.weight_grad_out, ctx.needs = weight_grad_out, needs


class ReducedLoss(torch.autograd.Function):
    """Saves float32 gradients, (T + V) D."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_grad_out, plan, needs):
        rows, factor = plan.weights.rows, plan.weights.factor
        losses, lse, is_best, *grads = _run(x, weight, bias, plan, rows, needs)
        _remember(ctx, x, weight, bias, weight_grad_out, needs)
        ctx.save_for_backward(*grads, factor)
        ctx.mark_non_differentiable(lse, is_best)
        return torch.where(rows == 0, 0, losses * rows).sum() * factor, lse, is_best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _dlse, _dis_best):
        *grads, factor = ctx.saved_tensors
        # A loss scaler's factor arrives before the rounding.
        return *_finish(ctx, grads, dloss * factor), None, None, None


class TokenLosses(torch.autograd.Function):
    """Saves the inputs: gradients wait for what each token's loss is worth, 2 T V D FLOPs more."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_grad_out, plan, needs):
        rows, most = plan.weights.rows, plan.weights.most
        losses, lse, is_best, *_ = _run(x, weight, bias, plan, rows, (False, False, False))
        _remember(ctx, x, weight, bias, weight_grad_out, needs)
        ctx.plan = plan
        ctx.save_for_backward(x, weight, bias)
        ctx.mark_non_differentiable(lse, is_best)
        return torch.where(rows == 0, 0, losses * rows * most), lse, is_best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses, _dlse, _dis_best):
        x, weight, bias = ctx.saved_tensors
        rows = ctx.plan.weights.rows * ctx.plan.weights.most * dlosses
        # Within [-1, 1], as the backends ask for; max of nothing has no value.
        most = torch.cat((rows.abs(), rows.new_zeros(1))).amax()
        rows = rows / torch.where(most > 0, most, 1)
        *_, dx, dweight, dbias = _run(x, weight, bias, ctx.plan, rows, ctx.needs)
        return *_finish(ctx, (dx, dweight, dbias), most), None, None, None
