"""A batch in parts whose contrastive loss is that of the whole batch (GradCache, arXiv:2101.06983).

Adding up the losses of small batches would lose all pairs across them. Here every part is embedded
without a graph, the loss over all pairs gives the gradient of each embedding, and every part runs
again with that gradient: one forward more (4/3 of the work), the activations of one part.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..models.inputs import batch_size, take_images
from ..self_distillation import take_prepared
from .parallel import gradient_sync, unwrapped
from .task import IMAGE_IDS, TEXT_IDS, Cached, Losses, Siglip2Task, task_totals


def accumulate(
    task: nn.Module,  # Siglip2Task, or its DDP or FSDP2 wrapping
    batch: Mapping[str, Any],
    num_parts: int,
) -> tuple[Losses, dict[str, Tensor]]:
    """`task(batch)` and the backward of its "loss", in `num_parts` parts.

    Gradients cross ranks with the last part. Nothing random may happen in the towers: both passes
    must agree.

    Raises ValueError when there are fewer images or texts than parts.
    """
    batch = unwrapped(task).prepared(batch)
    parts = list(_split(batch, num_parts))
    shares = _contrast(unwrapped(task), batch, parts)
    totals: Losses = {}
    for number, (part, cached) in enumerate(zip(parts, shares, strict=True), 1):
        losses, report = run_passes(task, part, cached=cached, is_last=number == num_parts)
        for name, value in losses.items():  # each is this part's share
            totals[name] = totals.get(name, 0.0) + value
    return {**totals, "sigmoid_loss": sum(share.loss for share in shares)}, report


def run_passes(
    task: nn.Module,
    batch: Mapping[str, Any],
    *,
    cached: Cached | None = None,
    is_last: bool = True,  # part of the batch: gradients cross ranks with its last pass
) -> tuple[Losses, dict[str, Tensor]]:
    """Forward and backward of each of a `Siglip2Task`'s passes; what is left adds up to one."""
    batch, passes = unwrapped(task).prepared(batch), unwrapped(task).passes
    totals: Losses = {}
    report: dict[str, Tensor] = {}
    for number, only in enumerate(passes, 1):
        with gradient_sync(task, is_last and number == len(passes)):
            losses, said = task(batch, cached=cached, only=only)
            losses["loss"].backward()
        report |= said
        for name, value in losses.items():
            value = value.detach()
            totals[name] = totals[name] + value if name in totals else value
    return totals, report


def _contrast(
    task: Siglip2Task, batch: Mapping[str, Any], parts: list[Mapping[str, Any]]
) -> list[Cached]:
    """What the loss over the whole batch gives to each part."""
    with torch.no_grad():
        txts = [task.embed_text(part) for part in parts]
    txt = torch.cat(txts).requires_grad_()
    leaves = [txt]

    def embed_images(_: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            leaves.append(torch.cat([task.embed_images(part) for part in parts]))
        return leaves[-1].requires_grad_()

    scalars = tuple(s.detach().requires_grad_() for s in (task.model.log_scale, task.model.bias))
    loss = task.contrast(batch, txt, embed_images, scalars)
    dtxt, dimg, dlog_scale, dbias = torch.autograd.grad(loss, [*leaves, *scalars])
    loss = loss.detach()
    sizes = [batch_size(part["image"]) for part in parts]
    rows = zip(dimg.split(sizes), dtxt.split([len(part) for part in txts]), strict=True)
    shares = [
        Cached(loss * (size / sum(sizes)), *row, None, None)
        for size, row in zip(sizes, rows, strict=True)
    ]
    # With the part whose gradients cross ranks: FSDP2 leaves the scalars to a hook.
    shares[-1] = shares[-1]._replace(dlog_scale=dlog_scale, dbias=dbias)
    return shares


def _split(batch: Mapping[str, Any], num_parts: int) -> Iterator[Mapping[str, Any]]:
    """Parts of nearly equal size; several captions of an image stay with it."""
    num_images, num_texts = batch_size(batch["image"]), batch["text"].shape[0]
    if min(num_images, num_texts) < num_parts:
        raise ValueError(
            f"need at least {num_parts} images and texts a step for accum_steps={num_parts};"
            f" got {num_images} images and {num_texts} texts. Lower train.accum_steps"
        )
    of_images = [num_images * i // num_parts for i in range(num_parts + 1)]
    if num_texts % num_images:
        of_texts = [num_texts * i // num_parts for i in range(num_parts + 1)]
    else:
        of_texts = [i * (num_texts // num_images) for i in of_images]
    said, prepared = batch.get("task_texts"), batch.get("prepared")
    totals = None if said is None else task_totals(said, batch["text"].device)
    for (i, j), (k, m) in zip(pairwise(of_images), pairwise(of_texts), strict=True):
        yield {
            "image": take_images(batch["image"], i, j),
            "text": batch["text"][k:m],
            **{key: batch[key][i:j] for key in IMAGE_IDS if key in batch},
            **{key: batch[key][k:m] for key in TEXT_IDS if key in batch},
            **({} if said is None else {"task_texts": said[i:j], "task_totals": totals}),
            **({} if prepared is None else {"prepared": take_prepared(prepared, i, j)}),
        }
