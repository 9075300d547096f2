"""The decoder's loss on anybody's vision tokens (SigLIP 2, section 2.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from siglip2_kernels import linear_cross_entropy

from ..models.decoder import Decoder
from .packing import PackedTexts, Totals, draw_parallel, pack_texts
from .tasks import Encoder, ImageTexts, TaskText, task_texts


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
        config, texts = self.decoder.config, []
        for number, image in enumerate(images):
            try:
                said = task_texts(image, encoder, config.length, config.max_coordinate)
            except ValueError as error:
                raise ValueError(f"image {number}: {error}") from None
            texts.append(draw_parallel(said, self.parallel_share, rng))
        return self.pack_tokens(texts, vision_lengths, device=device)

    def pack_tokens(
        self,
        images: Sequence[Sequence[TaskText]],
        vision_lengths: Sequence[int],
        *,
        totals: Totals | None = None,
        device: torch.device | str | None = None,
    ) -> PackedTexts:
        """As `pack`, of texts that are tokens already; `totals` as for `pack_texts`."""
        return pack_texts(
            images,
            vision_lengths,
            mask_id=self.decoder.mask_id,
            per_token=self.per_token,
            totals=totals,
            device=device,
        )

    def forward(
        self,
        vision: Tensor,  # (S, Dv) un-pooled tokens of all images, or (B, N, Dv) padded behind
        packed: PackedTexts,
    ) -> DecoderLoss:
        """Raises ValueError when the tokens are not those that `packed` was made for."""
        vision = _without_padding(vision, packed, self.decoder.config.vision_width)
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


def _without_padding(vision: Tensor, packed: PackedTexts, width: int) -> Tensor:  # (S, Dv)
    cu_seqlens = packed.texts.images.cu_seqlens_k
    B, S = cu_seqlens.shape[0] - 1, packed.num_vision
    if vision.shape == (S, width):
        return vision
    if (
        vision.ndim != 3
        or vision.shape[::2] != (B, width)
        or vision.shape[1] < packed.longest_vision
    ):
        raise ValueError(
            f"need vision tokens ({S}, {width}), or ({B}, N, {width}) of"
            f" N >= {packed.longest_vision}; got {tuple(vision.shape)}"
        )
    vision, N = vision.flatten(0, 1), vision.shape[1]
    if vision.shape[0] == S:
        return vision
    # Rows of images from the offsets on the device: nothing is waited for.
    rows = torch.arange(S, device=vision.device)
    image = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True, out_int32=True)
    return vision.index_select(0, rows + image * N - cu_seqlens[image])


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
