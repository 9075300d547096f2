"""The sigmoid loss as a module with open_clip's signature, exact over any number of ranks."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip2_kernels import sigmoid_loss

from .distributed import gather_counts, gather_rows

log = logging.getLogger("siglip2")

OPEN_CLIP_IMPLS = ("bidir", "shift", "reduce")


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss (arXiv:2303.15343) with open_clip's call and convention.

    The value is the sum over local images x all texts, divided by global batch / world size: the
    local batch when all ranks hold as many, and in any case the number whose mean over ranks is the
    global loss (what DDP and FSDP average). Ranks may hold different numbers of rows, or none.

    Args:
        rank, world_size, cache_labels, chunk_size: accepted for open_clip; the process group
            decides, and memory is bounded without a chunk size.
        dist_impl: "gather" (default). open_clip's "bidir", "shift" and "reduce" give the same
            numbers here by "gather".
        process_group: ranks that share negatives; None means all.
        backend: see `siglip2_kernels.sigmoid_loss`.

    Raises ValueError when `world_size` contradicts the process group, NotImplementedError for an
    unknown `dist_impl`.
    """

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
    ):
        super().__init__()
        if dist_impl in OPEN_CLIP_IMPLS:
            log.info(
                "dist_impl=%r: using 'gather', which gives the same loss and gradients", dist_impl
            )
        elif dist_impl not in (None, "gather"):
            raise NotImplementedError(
                f"need dist_impl 'gather' (or open_clip's {', '.join(OPEN_CLIP_IMPLS)});"
                f" got {dist_impl!r}"
            )
        ranks = dist.get_world_size(process_group) if dist.is_initialized() else 1
        if world_size not in (1, ranks):
            raise ValueError(
                f"sigmoid loss got world_size={world_size} but the process group has {ranks} ranks."
                " Start with torchrun and initialise torch.distributed, or leave world_size out"
            )
        self.process_group = process_group
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,  # (B, D) unit
        text_features: Tensor,  # (M, D) unit
        logit_scale: Tensor,  # () exponentiated
        logit_bias: Tensor | None = None,  # ()
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,  # (B,) int64: equal ids are positives
        text_ids: Tensor | None = None,  # (M,) int64
    ) -> Tensor | dict[str, Tensor]:
        if (image_ids is None) != (text_ids is None):
            raise ValueError("need both image_ids and text_ids, or neither; got one of them")
        bias = logit_scale.new_zeros(()) if logit_bias is None else logit_bias
        share = image_features.shape[0]
        if dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            share, image_ids, text_features, text_ids = self._gather(
                image_features, text_features, image_ids, text_ids
            )
        total = sigmoid_loss(
            image_features,
            text_features,
            logit_scale.float().reshape(()).log(),
            bias.float().reshape(()),
            img_ids=image_ids,
            txt_ids=text_ids,
            reduction="sum",
            backend=self.backend,
        )
        loss = total / (share or 1)
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(
        self, img: Tensor, txt: Tensor, image_ids: Tensor | None, text_ids: Tensor | None
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        group, num = self.process_group, img.shape[0]
        counts = gather_counts((num, txt.shape[0]), img.device, group)
        num_images, num_texts = (list(column) for column in zip(*counts, strict=True))
        if image_ids is None:
            if num_images != num_texts:  # the same on every rank, so that none is left waiting
                raise ValueError(
                    "need as many texts as images on each rank, or ids;"
                    f" got {num_images} images and {num_texts} texts"
                )
            # Pairing by position: positions over all ranks become the ids.
            first = sum(num_images[: dist.get_rank(group)])
            image_ids = text_ids = torch.arange(first, first + num, device=img.device)
        txt, text_ids = (gather_rows(x, num_texts, group) for x in (txt, text_ids))
        return sum(num_images) / len(num_images), image_ids, txt, text_ids
