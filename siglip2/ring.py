"""The sigmoid loss over texts that travel from rank to rank, for very large global batches.

A text block and the float32 sum of its gradients go once around the ring of R ranks. In step s rank
r works on the block of rank r - s: the next block and the sum for this one arrive while it
computes, the last block and its finished part of the sum leave. A sum is home after R hops.
Memory is O((B + M) D), whatever R is; a step sends M D elements and as many float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import Holdings, waiting_for


class Block(NamedTuple):
    """One rank's texts and what says which pairs they are part of."""

    txt: Tensor  # (M, D)
    ids: Tensor | None  # (M,); None: by position
    ignore_ids: Tensor | None  # (M,)

    def empty(self, num_rows: int) -> "Block":
        """Room for another rank's."""
        return Block(*(None if x is None else x.new_empty(num_rows, *x.shape[1:]) for x in self))

    def tensors(self) -> list[Tensor]:
        return [x for x in self if x is not None]


class _Neighbours:
    """Where blocks go and come from."""

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group or dist.group.WORLD
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        # Point-to-point calls take global ranks, whatever the group.
        self._to = dist.get_global_rank(self._group, (rank + 1) % num_ranks)
        self._from = dist.get_global_rank(self._group, (rank - 1) % num_ranks)

    def start(self, sent: list[Tensor], received: list[Tensor]) -> list[dist.Work]:
        """Both lists are in the same order on all ranks, which is how messages find their place."""
        ops = [dist.P2POp(dist.isend, x, self._to, self._group) for x in sent]
        ops += [dist.P2POp(dist.irecv, x, self._from, self._group) for x in received]
        with waiting_for(self._what(), self._group):
            return dist.batch_isend_irecv(ops) if ops else []

    def wait(self, works: list[dist.Work]) -> None:
        with waiting_for(self._what(), self._group):
            for work in works:
                work.wait()

    def _what(self) -> str:
        return f"texts from rank {self._from} and room at rank {self._to} in a ring"


class _RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, img, txt, log_scale, bias, ring, needs):
        needs_dimg, needs_dtxt = needs
        neighbours, block = _Neighbours(ring.group), ring.first_block(txt)
        home = [torch.empty_like(block.txt, dtype=ring.acc)] if needs_dtxt else []
        scalars, dimg, finished = [], None, []  # finished: the sum that leaves, if there is one
        for step in range(ring.num_ranks):
            coming = ring.room(block, step + 1) if step + 1 < ring.num_ranks else None
            arriving = [torch.empty_like(block.txt, dtype=ring.acc)] if finished else []
            works = neighbours.start(
                (block.tensors() if coming else []) + finished,
                (coming.tensors() if coming else []) + arriving,
            )
            part = ring.part(img, block, log_scale, bias, step, needs)
            scalars.append(torch.stack((part.loss, part.dlog_scale, part.dbias)))
            if needs_dimg:
                dimg = part.dimg if dimg is None else dimg.add_(part.dimg)
            neighbours.wait(works)
            if needs_dtxt:
                finished = [part.dtxt.add_(x) for x in arriving] or [part.dtxt]
            block = coming
        neighbours.wait(neighbours.start(finished, home))
        loss, dlog_scale, dbias = torch.stack(scalars).sum(0).unbind()
        ctx.save_for_backward(dimg, *(home or [None]), dlog_scale, dbias)
        ctx.dtypes = img.dtype, txt.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        *dfeatures, dlog_scale, dbias = ctx.saved_tensors
        # out= scales and rounds in one pass.
        dimg, dtxt = (
            None if x is None else torch.mul(x, dloss, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip(dfeatures, ctx.dtypes, strict=True)
        )
        return dimg, dtxt, dlog_scale * dloss, dbias * dloss, None, None


class _Ring(NamedTuple):
    compute: Callable  # sigmoid_loss_and_grads, with what is the same for all blocks
    holdings: Holdings
    text_ids: tuple[Tensor | None, Tensor | None]  # this rank's ids and ignore ids
    acc: torch.dtype
    group: dist.ProcessGroup | None

    @property
    def num_ranks(self) -> int:
        return len(self.holdings.texts)

    def first_block(self, txt: Tensor) -> Block:
        """This rank's; messages are contiguous."""
        return Block(*(None if x is None else x.contiguous() for x in (txt, *self.text_ids)))

    def origin(self, step: int) -> int:
        return (self.holdings.rank - step) % self.num_ranks

    def room(self, block: Block, step: int) -> Block:
        return block.empty(self.holdings.texts[self.origin(step)])

    def part(self, img, block: Block, log_scale, bias, step: int, needs: tuple[bool, bool]):
        """Loss and gradients of this rank's images and one block."""
        ids = block.ids
        if ids is None:
            ids = self.holdings.text_positions(self.origin(step), img.device)
        return self.compute(
            img,
            block.txt,
            log_scale,
            bias,
            txt_ids=ids,
            txt_ignore_ids=block.ignore_ids,
            needs_dimg=needs[0],
            needs_dtxt=needs[1],
        )


def ring_sigmoid_loss(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    compute: Callable,
    holdings: Holdings,
    text_ids: Tensor | None = None,  # (M,)
    text_ignore_ids: Tensor | None = None,  # (M,)
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # ()
    """Sum of the loss of this rank's images with the texts of all ranks.

    Args:
        compute: `sigmoid_loss_and_grads` with the images' ids and all options bound, "sum".
        holdings: Rows of all ranks.
        text_ids: None: paired by position over all ranks.

    All exchange is in the forward; the backward only scales what it saved, (B + M) D float32. So
    the backward waits for nobody, but all ranks' losses must be weighted alike: the gradient of a
    text sums what every rank sent, and is multiplied by this rank's upstream gradient. Averaging
    over ranks and loss scalers do weight alike.

    A frozen tower and `torch.no_grad` skip their products and send no gradients. Raises
    RankLostError when a neighbour dies.
    """
    acc = torch.promote_types(txt.dtype, torch.float32)
    ring = _Ring(compute, holdings, (text_ids, text_ignore_ids), acc, group)
    grad = torch.is_grad_enabled()
    needs = (grad and img.requires_grad, grad and txt.requires_grad)
    return _RingLoss.apply(img, txt, log_scale, bias, ring, needs)
