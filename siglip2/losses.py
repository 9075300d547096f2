"""The sigmoid loss as a module with open_clip's signature, exact over any number of ranks."""

import logging
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip2_kernels import sigmoid_loss, sigmoid_loss_and_grads

from .distributed import check_descriptions, wait_for_all
from .gather import PendingTexts, gathered_sigmoid_loss
from .ring import ring_sigmoid_loss

log = logging.getLogger("siglip2")

OPEN_CLIP_IMPLS = ("bidir", "shift", "reduce")


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss (arXiv:2303.15343) with open_clip's call and convention.

    The value is the sum over local images x all texts, divided by global batch / world size: the
    local batch when all ranks hold as many, and in any case the number whose mean over ranks is the
    global loss (what DDP and FSDP average). Ranks may hold different numbers of rows, or none.

    Loss and gradients are made in the forward, in float32. With "gather" a rank holds all texts
    during the forward and their gradients until the backward, which sums them over ranks in
    float32: O(global batch x D). With "ring" it is O(local batch x D), and all exchange is in the
    forward; see `siglip2.ring`.

    To hide the exchange behind the image tower, call `start_gather` between the towers:

        texts = loss.start_gather(encode_text(text), num_images=len(image))
        loss(encode_image(image), texts, logit_scale, logit_bias)

    Args:
        rank, world_size, cache_labels, chunk_size: accepted for open_clip; the process group
            decides, and memory is bounded without a chunk size.
        dist_impl: "gather" (None) or "ring". open_clip's "bidir", "shift" and "reduce" give the
            same numbers here by "gather".
        process_group: ranks that share negatives; None means all.
        backend: see `siglip2_kernels.sigmoid_loss`.
        normalize: features come unnormalised and are divided by their norms here.
        check_shapes: the first call waits for all ranks, `arrival_timeout_s` at most, and compares
            what they hold before anything else is exchanged.

    Raises ValueError when `world_size` contradicts the process group or, with `check_shapes`, when
    ranks hold different things (on every rank); NotImplementedError for an unknown `dist_impl`;
    `siglip2.distributed.RankLostError` when a rank dies or does not come.
    """

    arrival_timeout_s: float = 600.0

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str | None = None,
        normalize: bool = False,
        check_shapes: bool = False,
    ):
        super().__init__()
        if dist_impl in OPEN_CLIP_IMPLS:
            log.info(
                "dist_impl=%r: using 'gather', which gives the same loss and gradients", dist_impl
            )
        elif dist_impl not in (None, "gather", "ring"):
            raise NotImplementedError(
                f"need dist_impl 'gather' or 'ring' (or open_clip's {', '.join(OPEN_CLIP_IMPLS)});"
                f" got {dist_impl!r}"
            )
        ranks = dist.get_world_size(process_group) if dist.is_initialized() else 1
        if world_size not in (1, ranks):
            raise ValueError(
                f"sigmoid loss got world_size={world_size} but the process group has {ranks} ranks."
                " Start with torchrun and initialise torch.distributed, or leave world_size out"
            )
        self.is_ring = dist_impl == "ring"
        self.process_group = process_group
        self.backend = backend
        self.normalize = normalize
        self._unchecked = {"texts", "images"} if check_shapes else set()

    @property
    def _is_distributed(self) -> bool:
        return dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def start_gather(
        self,
        text_features: Tensor,  # (M, D)
        *,
        num_images: int,
        text_ids: Tensor | None = None,  # (M,) int64
        text_ignore_ids: Tensor | None = None,  # (M,) int64
    ) -> PendingTexts:
        """Send the texts to all ranks while other work goes on; pass the result to `forward`.

        Call it before the image tower, whose backward then hides the gradients' way back as well.
        `num_images` is how many images this rank's `forward` will have. With "ring" or on one rank
        nothing is sent.
        """
        if self._is_distributed:
            self._check("texts", text_features, text_ids, text_ignore_ids)
        pending = PendingTexts(text_features, text_ids, text_ignore_ids, num_images)
        if self._is_distributed and not self.is_ring:
            pending.start(self.process_group)
        return pending

    def forward(
        self,
        image_features: Tensor,  # (B, D) unit
        text_features: Tensor | PendingTexts,  # (M, D) unit
        logit_scale: Tensor,  # () exponentiated
        logit_bias: Tensor | None = None,  # ()
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,  # (B,) int64: equal ids are positives
        text_ids: Tensor | None = None,  # (M,) int64
        image_ignore_ids: Tensor | None = None,  # (B,) int64: equal ones that are no positives
        text_ignore_ids: Tensor | None = None,  # (M,) int64   count nothing
    ) -> Tensor | dict[str, Tensor]:
        num_images, pending = len(image_features), text_features
        if not isinstance(pending, PendingTexts):
            ids = {"text_ids": text_ids, "text_ignore_ids": text_ignore_ids}
            pending = self.start_gather(text_features, num_images=num_images, **ids)
        elif text_ids is not None or text_ignore_ids is not None:
            raise ValueError("text ids go into start_gather, with the texts; got some here as well")
        if self._is_distributed:
            self._check("images", image_features, image_ids, image_ignore_ids)
        _check_both("ids", image_ids, pending.ids)
        _check_both("ignore_ids", image_ignore_ids, pending.ignore_ids)
        acc = torch.promote_types(image_features.dtype, torch.float32)
        log_scale = logit_scale.to(acc).reshape(()).log()
        bias = log_scale.new_zeros(()) if logit_bias is None else logit_bias.to(acc).reshape(())
        loss = self._loss(
            image_features,
            log_scale,
            bias,
            pending,
            img_ids=image_ids,
            img_ignore_ids=image_ignore_ids,
            reduction="sum",
            normalize=self.normalize,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self, img: Tensor, log_scale: Tensor, bias: Tensor, pending: PendingTexts, **options
    ) -> Tensor:
        group, gather = self.process_group, pending.take(len(img))
        ids = {"txt_ids": pending.ids, "txt_ignore_ids": pending.ignore_ids}
        if not self._is_distributed:
            total = sigmoid_loss(img, pending.txt, log_scale, bias, **ids, **options)
            return total / (len(img) or 1)
        holdings = gather.holdings if gather is not None else pending.holdings(group)
        if pending.ids is None:
            options["img_ids"] = holdings.image_positions(img.device)
        compute = partial(sigmoid_loss_and_grads, **options)
        if gather is not None:
            total = gathered_sigmoid_loss(
                img, log_scale, bias, gather, compute=compute, group=group
            )
        else:
            total = ring_sigmoid_loss(
                img,
                pending.txt,
                log_scale,
                bias,
                compute=compute,
                holdings=holdings,
                text_ids=pending.ids,
                text_ignore_ids=pending.ignore_ids,
                group=group,
            )
        return total / (holdings.share or 1)

    def _check(self, what: str, x: Tensor, ids: Tensor | None, ignore_ids: Tensor | None) -> None:
        if what not in self._unchecked:
            return
        if what == "texts":
            wait_for_all("the first sigmoid loss", self.arrival_timeout_s, self.process_group)
        self._unchecked.remove(what)
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        mine = (
            f"(n, {', '.join(map(str, x.shape[1:]))}) {x.dtype},"
            f" {_described('ids', ids)}, {_described('ignore ids', ignore_ids)},"
            f" {'a' if needs_grad else 'no'} gradient"
        )
        check_descriptions(f"the sigmoid loss's {what}", mine, x.device, self.process_group)


def _described(name: str, ids: Tensor | None) -> str:
    return f"no {name}" if ids is None else f"{name} {ids.dtype}"


def _check_both(name: str, image_ids: Tensor | None, text_ids: Tensor | None) -> None:
    if (image_ids is None) != (text_ids is None):
        raise ValueError(f"need both image_{name} and text_{name}, or neither; got one of them")
