"""The decoder's loss on anybody's vision tokens (SigLIP 2, section 2.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from siglip2_kernels import linear_cross_entropy

from ..models.decoder import Decoder
from .packing import PackedTexts, pack_texts
from .tasks import Encoder, ImageTexts, task_texts


class DecoderLoss(NamedTuple):
    loss: Tensor  # ()
    token_accuracy: Tensor  # () of the tokens that are guessed


class LocCaLoss(nn.Module):
    """Captioning, referring expressions and grounded captioning in one pass of `decoder`.

    The loss is the sum over the three tasks of the mean over texts of the mean over their tokens.
    How the tasks are combined is not published; equal weights follow its "equal weight".

    Args:
        parallel_share: Captions whose tokens are guessed all at once.
        per_token: Tokens count alike within a task, instead of texts.
    """

    def __init__(self, decoder: Decoder, *, parallel_share: float = 0.5, per_token: bool = False):
        super().__init__()
        self.decoder = decoder
        self.parallel_share, self.per_token = parallel_share, per_token

    def pack(
        self,
        images: Sequence[ImageTexts],
        vision_lengths: Sequence[int],
        encoder: Encoder,
        *,
        rng: np.random.Generator,
        device: torch.device | str | None = None,
    ) -> PackedTexts:
        """Words to one packed batch, on the host: for the collator, or the loop.

        Raises ValueError for a box that is none, naming the image.
        """
        texts = []
        for number, image in enumerate(images):
            try:
                texts.append(task_texts(image, encoder, self.decoder.config.length))
            except ValueError as error:
                raise ValueError(f"image {number}: {error}") from None
        return pack_texts(
            texts,
            vision_lengths,
            mask_id=self.decoder.mask_id,
            rng=rng,
            parallel_share=self.parallel_share,
            per_token=self.per_token,
            device=device,
        )

    def forward(
        self,
        vision: Tensor,  # (S, Dv) un-pooled tokens of all images, or (B, N, Dv)
        packed: PackedTexts,
    ) -> DecoderLoss:
        """Raises ValueError when the tokens are not of the decoder's `vision_width`."""
        if vision.ndim == 3:
            vision = vision.flatten(0, 1)
        width = self.decoder.config.vision_width
        if vision.ndim != 2 or vision.shape[1] != width:
            raise ValueError(f"need vision tokens (S, {width}); got {tuple(vision.shape)}")
        hidden = self.decoder(packed.texts, vision)
        found = linear_cross_entropy(
            hidden,
            self.decoder.head,
            packed.target,
            bias=self.decoder.head_bias,
            token_weight=packed.weight,
            reduction="sum",
            valid_index=packed.counted,
            return_accuracy=True,
        )
        return DecoderLoss(found.loss, found.token_accuracy)


class CaptionLoss(LocCaLoss):
    """Captions alone: `pack` takes strings."""

    def pack(
        self,
        images: Sequence[str],
        vision_lengths: Sequence[int],
        encoder: Encoder,
        *,
        rng: np.random.Generator,
        device: torch.device | str | None = None,
    ) -> PackedTexts:
        texts = [ImageTexts(caption) for caption in images]
        return super().pack(texts, vision_lengths, encoder, rng=rng, device=device)
