"""The functions that users call: checked, with every argument said once, at `sigmoid_loss`."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._core.backend import Backend
from . import reference
from .inputs import Pairs
from .op import SigmoidLoss, fwd, grad_of_rows, make_plan, sums


def sigmoid_loss(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    img_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ids: Tensor | None = None,  # (M,) int32 or int64
    img_ignore_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ignore_ids: Tensor | None = None,  # (M,) int32 or int64
    img_weight: Tensor | None = None,  # (B,)
    txt_weight: Tensor | None = None,  # (M,)
    normalize: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    backend: Backend | None = None,
) -> Tensor:  # (), float32; float64 for float64 inputs
    """Sigmoid loss summed over all pairs; "mean" divides by B, the images, not by B M.

    Args:
        img: Unit vectors, as is `txt`, unless `normalize` says otherwise.
        log_scale: Logarithm of the temperature that multiplies the dot products.
        img_ids: A pair whose ids are equal is a positive. None, for both ids: B == M and the
            positives are i <-> i.
        img_ignore_ids: A pair whose ignore ids are equal and that is no positive counts nothing:
            captions of one image, duplicates. None, for both: every pair counts.
        img_weight: Factor on all pairs of an image; no gradient flows to weights.
        normalize: Divide rows by (||x|| + 1e-8) first, in float32; gradients are those of the rows
            as given. Half-precision rows become float16 unit rows, which keep 11 bits.
        backend: None takes the fastest that supports the input, "chunked" on the CPU.

    Differentiable once in img, txt, log_scale and bias; 0 for an empty batch. Accumulates in
    float32, deterministic. Gradients have their inputs' dtypes; until the backward they are kept
    in float32, 4 (B + M) D bytes.

    Raises:
        ValueError: A shape, dtype or device is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    inputs = img, txt, log_scale, bias
    pairs = Pairs(img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight)
    options = {"normalize": normalize, "reduction": reduction}
    plan = make_plan(*inputs, pairs, **options, backend=backend)
    if plan.backend == "reference":
        with torch.autocast(img.device.type, enabled=False):
            return reference.sigmoid_loss(*inputs, **options, **pairs._asdict())
    grad = torch.is_grad_enabled()
    needs = (grad and img.requires_grad, grad and txt.requires_grad)
    return SigmoidLoss.apply(*inputs, plan, needs)


class LossAndGrads(NamedTuple):
    """A loss and its gradients, all float32 (float64 for float64 inputs) and without a graph."""

    loss: Tensor  # ()
    dimg: Tensor | None  # (B, D)
    dtxt: Tensor | None  # (M, D)
    dlog_scale: Tensor  # ()
    dbias: Tensor  # ()


@torch.no_grad()
def sigmoid_loss_and_grads(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    img_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ids: Tensor | None = None,  # (M,) int32 or int64
    img_ignore_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ignore_ids: Tensor | None = None,  # (M,) int32 or int64
    img_weight: Tensor | None = None,  # (B,)
    txt_weight: Tensor | None = None,  # (M,)
    normalize: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    needs_dimg: bool = True,
    needs_dtxt: bool = True,
    backend: Backend | None = None,
) -> LossAndGrads:
    """The loss and its gradients at once, without autograd: for rings of ranks and cached batches.

    Arguments and errors are those of `sigmoid_loss`. A gradient that is not needed is None, and its
    product does not run.
    """
    inputs = img, txt, log_scale, bias
    pairs = Pairs(img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight)
    options = {"normalize": normalize, "reduction": reduction}
    plan = make_plan(*inputs, pairs, **options, backend=backend)
    needs = needs_dimg, needs_dtxt
    if plan.backend == "reference":
        return _autograd_of_reference(inputs, needs, **options, **pairs._asdict())
    totals, *grads = fwd(plan.img, plan.txt, log_scale, bias, *plan.pairs, *needs, plan.backend)
    loss, dlog_scale, dbias = (totals * plan.factor).unbind()
    scale = log_scale.to(loss.dtype).exp()
    draw = plan.factor * scale
    dimg, dtxt = (
        grad_of_rows(plan.rows_backend, d, x, draw, loss.dtype) if needed else None
        for d, x, needed in zip(grads, (img, txt), needs, strict=True)
    )
    return LossAndGrads(loss, dimg, dtxt, dlog_scale * scale, dbias)


def _autograd_of_reference(
    inputs: tuple[Tensor, ...], needs: tuple[bool, bool], **options
) -> LossAndGrads:
    acc = torch.promote_types(inputs[0].dtype, torch.float32)
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        learned = [x.detach().to(acc).requires_grad_() for x in inputs]
        loss = reference.sigmoid_loss(*learned, **options)
        dimg, dtxt, *scalars = torch.autograd.grad(loss, learned)
    return LossAndGrads(
        loss.detach(), dimg if needs[0] else None, dtxt if needs[1] else None, *scalars
    )


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
    img_ignore_ids: Tensor | None = None,  # (B,) int32 or int64
    txt_ignore_ids: Tensor | None = None,  # (M,) int32 or int64
    img_weight: Tensor | None = None,  # (B,)
    txt_weight: Tensor | None = None,  # (M,)
    normalize: bool = False,
    backend: Backend | None = None,
) -> LossSums:  # (B,), (M,), float32; float64 for float64 inputs
    """Weighted pair losses summed over captions and over images, for curation and logging.

    Arguments and errors are those of `sigmoid_loss`, whose "sum" is the sum of either output. No
    gradient.
    """
    inputs = img, txt, log_scale, bias
    pairs = Pairs(img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight)
    plan = make_plan(*inputs, pairs, normalize=normalize, reduction="sum", backend=backend)
    if plan.backend == "reference":
        with torch.autocast(img.device.type, enabled=False):
            return LossSums(
                *reference.pairwise_sigmoid_loss_sums(
                    *inputs, normalize=normalize, **pairs._asdict()
                )
            )
    rows, columns = sums(plan.img, plan.txt, log_scale, bias, *plan.pairs, plan.backend)
    return LossSums(rows * plan.factor, columns * plan.factor)
