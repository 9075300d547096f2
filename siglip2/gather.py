"""The sigmoid loss over texts gathered from all ranks, behind other work.

A rank holds the texts of all ranks during the forward, O(global batch x D), and the float32
gradients of all of them until the backward, where a reduce-scatter brings each home. Both
exchanges run while the towers compute if the gather starts before the image tower.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import Holdings, PendingRows, PendingSum, gather_holdings


class _Returning:
    """A place for the gradient of this rank's texts, between the node that asks and the one that
    waits."""

    pending: PendingSum | None = None


class _AwaitTextGradient(torch.autograd.Function):
    """Stands for the gathered texts: its backward waits for what the other ranks send back.

    The engine runs later nodes first. This one is made before the image tower's, so the tower's
    backward runs between the start of the reduce-scatter and this wait.
    """

    @staticmethod
    def forward(ctx, txt, returning):
        ctx.returning, ctx.dtype = returning, txt.dtype
        return txt.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        pending, ctx.returning.pending = ctx.returning.pending, None
        return pending.wait().to(ctx.dtype), None


class _LossOverGathered(torch.autograd.Function):
    """Loss and gradients in the forward; the backward scales them and sends the texts' home."""

    @staticmethod
    def forward(ctx, img, stand_in, log_scale, bias, compute, needs, returning, sizes, group):
        needs_dimg, needs_dtxt = needs
        out = compute(img, log_scale, bias, needs_dimg=needs_dimg, needs_dtxt=needs_dtxt)
        ctx.save_for_backward(out.dimg, out.dtxt, out.dlog_scale, out.dbias)
        ctx.dtype, ctx.returning, ctx.sizes, ctx.group = img.dtype, returning, sizes, group
        ctx.stand_in_dtype = stand_in.dtype
        return out.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dimg, dtxt, dlog_scale, dbias = ctx.saved_tensors
        dstand_in = None
        if dtxt is not None:
            ctx.returning.pending = PendingSum(dtxt, dloss, ctx.sizes, ctx.group)
            dstand_in = dloss.new_zeros((), dtype=ctx.stand_in_dtype)
        if dimg is not None:  # out= scales and rounds in one pass
            dimg = torch.mul(dimg, dloss, out=torch.empty_like(dimg, dtype=ctx.dtype))
        return dimg, dstand_in, dlog_scale * dloss, dbias * dloss, *(None,) * 5


class Gather(NamedTuple):
    """Texts of all ranks on their way here, and the way back of their gradients."""

    holdings: Holdings
    rows: PendingRows
    ids: PendingRows | None
    ignore_ids: PendingRows | None
    stand_in: Tensor  # ()
    returning: _Returning


class PendingTexts:
    """Texts `SigLipLoss.start_gather` took; its `forward` takes them from here, once."""

    def __init__(
        self,
        txt: Tensor,  # (M, D)
        ids: Tensor | None,  # (M,)
        ignore_ids: Tensor | None,  # (M,)
        num_images: int,
    ):
        self.txt, self.ids, self.ignore_ids, self.num_images = txt, ids, ignore_ids, num_images
        self.gather: Gather | None = None
        self.is_taken = False

    def holdings(self, group: dist.ProcessGroup | None) -> Holdings:
        sizes = self.num_images, len(self.txt)
        return gather_holdings(*sizes, self.txt.device, group, is_paired=self.ids is None)

    def start(self, group: dist.ProcessGroup | None) -> None:
        # Host numbers first: whatever they wait for, the rows are not queued before it.
        holdings = self.holdings(group)
        rows, ids, ignore_ids = (
            None if x is None else PendingRows(x, holdings.texts, group)
            for x in (self.txt, self.ids, self.ignore_ids)
        )
        returning = _Returning()
        stand_in = _AwaitTextGradient.apply(self.txt, returning)
        self.gather = Gather(holdings, rows, ids, ignore_ids, stand_in, returning)

    def take(self, num_images: int) -> Gather | None:
        if self.is_taken:
            raise ValueError(
                "these pending texts went into a loss before; call start_gather again for another"
            )
        if num_images != self.num_images:
            raise ValueError(
                f"need the {self.num_images} images start_gather was told of; got {num_images}"
            )
        self.is_taken = True
        gather, self.gather = self.gather, None
        return gather


def gathered_sigmoid_loss(
    img: Tensor,  # (B, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    gather: Gather,
    *,
    compute: Callable,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # ()
    """Sum of the loss of this rank's images with the texts of all ranks.

    Args:
        gather: Of `PendingTexts.take`; awaited here.
        compute: `sigmoid_loss_and_grads` with the images' ids and all options bound, "sum".

    A frozen tower and `torch.no_grad` skip their products and send no gradients. Raises
    RankLostError when a rank dies.
    """
    txt, ids, ignore_ids = (
        None if x is None else x.wait() for x in (gather.rows, gather.ids, gather.ignore_ids)
    )
    if ids is None:  # paired by position over all ranks
        ids = torch.arange(len(txt), device=img.device)

    def over_texts(img: Tensor, log_scale: Tensor, bias: Tensor, **needs: bool):
        pairs = {"txt_ids": ids, "txt_ignore_ids": ignore_ids}
        return compute(img, txt, log_scale, bias, **pairs, **needs)

    grad = torch.is_grad_enabled()
    needs = (grad and img.requires_grad, grad and gather.stand_in.requires_grad)
    way_back = (gather.returning, gather.holdings.texts, group)
    return _LossOverGathered.apply(
        img, gather.stand_in, log_scale, bias, over_texts, needs, *way_back
    )
