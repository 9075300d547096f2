"""Cross entropy of a linear layer's outputs over a large vocabulary, without its logits.

    z_tv = <x_t, weight_v> + bias_v,    then softcap tanh(z / softcap) if there is a cap
    loss_t = lse_t - (1 - s) z_t,target - s mean_v z_tv + z_loss lse_t^2,    lse_t = log sum_v exp z_tv
    dl_t/dz_tv = p_tv (1 + 2 z_loss lse_t) - (1 - s) [v = target_t] - s / V

Losses and gradients come from one pass over chunks of tokens: memory O(chunk V + (T + V) D) instead
of O(T V), 6 T V D FLOPs with both gradients, 4 with one, 2 with none.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.backend import choose, no_triton
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
    weight = weight if plan.backend == "chunked" else weight.to(x.dtype)
    target, wants = plan.weights.target, (*needs, plan.wants_accuracy)
    return fwd(x, weight, target, bias, row_weight, *plan.options, *wants, plan.backend)


def _grads(ctx, grads, scale, weight_grad_out):
    """Scaled and rounded once; the weight's goes to its buffer if there is one."""
    dx, dweight, dbias = (
        # out= scales and rounds in one pass.
        torch.mul(d, scale, out=torch.empty_like(d, dtype=dtype)) if needed else None
        for d, dtype, needed in zip(
            grads, ctx.dtypes, ctx.needs[:1] + (ctx.needs[1] and weight_grad_out is None,) + ctx.needs[2:], strict=True
        )
    )
    if weight_grad_out is not None:
        weight_grad_out.addcmul_(grads[1], scale)
    return dx, dweight, dbias
