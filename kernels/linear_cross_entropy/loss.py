"""The function that users call."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._core.backend import Backend
from . import reference
from .inputs import Options
from .op import Plan, ReducedLoss, TokenLosses, make_plan


class LossAndStatistics(NamedTuple):
    """A loss, and what was asked for beside it; no gradient flows to the latter."""

    loss: Tensor  # (), or (T,) for "none"
    lse: Tensor | None  # (T,) log sum of exponentials of each token's logits, 0 if not in the index
    # (), share of the counting tokens of whose logits none is larger than the target's; (T,) of 0
    # and 1 for "none"
    token_accuracy: Tensor | None


def linear_cross_entropy(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D), dtype of x; or float32, which is rounded to 16-bit x's dtype first
    target: Tensor,  # (T,) int32 or int64
    *,
    bias: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (T,)
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    valid_index: Tensor | None = None,  # (n,) int32 or int64
    weight_grad_out: Tensor | None = None,  # (V, D) float32
    return_lse: bool = False,
    return_accuracy: bool = False,
    backend: Backend | None = None,
) -> Tensor | LossAndStatistics:  # float32; float64 for float64 inputs
    """Cross entropy of x @ weight.T + bias against `target`; no (T, V) tensor is kept.

    Args:
        token_weight: Factor on a token's loss; "mean" divides by the sum over counting tokens.
        ignore_index: Target of tokens that do not count; all others lie in [0, V).
        z_loss: Factor on the squared log-sum-exp, added to each token's loss.
        softcap: Logits become softcap tanh(logits / softcap).
        chunk_tokens: Most tokens whose logits exist at a time; None bounds memory instead.
        valid_index: The tokens to look at, each once; all others cost nothing and count nothing.
        weight_grad_out: Takes the weight's gradient: the backward adds to it, and the weight
            itself gets none.
        return_lse, return_accuracy: Return `LossAndStatistics`.
        backend: None takes the fastest that supports the input, "chunked" on the CPU.

    Differentiable once in x, weight and bias; 0 when no token counts. Accumulates in float32,
    deterministic. Kept until the backward: float32 gradients, 4 (T + V) D bytes; for "none" the
    inputs, and the backward makes the logits again.

    Raises:
        ValueError: A shape, dtype, device or number is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    rows, plan = make_plan(
        *(x, weight, target, bias),
        token_weight=token_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        options=Options(label_smoothing, z_loss, softcap, chunk_tokens),
        valid_index=valid_index,
        weight_grad_out=weight_grad_out,
        wants_accuracy=return_accuracy,
        backend=backend,
    )
    run = _reference if plan.backend == "reference" else _fused
    loss, lse, is_best = run(rows, weight, bias, weight_grad_out, plan, reduction)
    accuracy = _accuracy(is_best, plan, reduction) if return_accuracy else None
    found = LossAndStatistics(loss, lse if return_lse else None, accuracy)
    if valid_index is not None:
        found = _placed(found, valid_index, x.shape[0])
    return found if return_lse or return_accuracy else found.loss


def _placed(found: LossAndStatistics, index: Tensor, T: int) -> LossAndStatistics:
    """What has one value a token, with 0 for tokens that are not in the index."""
    return LossAndStatistics(
        *(x if x is None or x.ndim == 0 else _spread(x, index, T) for x in found)
    )


def _fused(x, weight, bias, weight_grad_out, plan: Plan, reduction: str):
    grad = torch.is_grad_enabled()
    learned = [grad and t is not None and t.requires_grad for t in (x, weight, bias)]
    learned[1] = learned[1] or (any(learned) and weight_grad_out is not None)
    function = TokenLosses if reduction == "none" else ReducedLoss
    return function.apply(x, weight, bias, weight_grad_out, plan, tuple(learned))


def _reference(x, weight, bias, _weight_grad_out, plan: Plan, reduction: str):
    with torch.autocast(x.device.type, enabled=False):
        smoothing, z_loss, softcap, _ = plan.options
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        target, _, rows, most, factor = plan.weights
        terms = reference.token_terms(x, weight, target, bias=bias, **options)
        losses = rows * terms.losses
        loss = losses * most if reduction == "none" else losses.sum() * factor
        return loss, terms.lse, terms.is_best


def _accuracy(is_best: Tensor, plan: Plan, reduction: str) -> Tensor:
    is_right = (is_best & plan.weights.counts).to(plan.weights.rows.dtype)
    if reduction == "none":
        return is_right
    return is_right.sum() / plan.weights.counts.sum().clamp(min=1)


def _spread(values: Tensor, index: Tensor, T: int) -> Tensor:
    """Values at their tokens, 0 elsewhere."""
    return values.new_zeros(T).index_copy(0, index.long(), values)
