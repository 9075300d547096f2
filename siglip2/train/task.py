"""What a batch costs: the model and its objectives, under open_clip's task contract."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses import SigLipLoss
from ..models.inputs import HF_KEYS, batch_size
from ..models.siglip2 import Siglip2

IMAGE_IDS = ("image_ids", "image_ignore_ids")
TEXT_IDS = ("text_ids", "text_ignore_ids")

Losses = dict[str, Tensor]


class Cached(NamedTuple):
    """The contrastive loss of a whole batch, as one part of that batch must know it.

    dlog_scale and dbias are None in all parts but one.
    """

    loss: Tensor  # () this part's share of the value
    weight: float  # this part's share of the batch; scales losses that are means over images
    dimg: Tensor  # (b, D) d(loss)/d(embeddings of this part)
    dtxt: Tensor  # (m, D)
    dlog_scale: Tensor | None  # ()
    dbias: Tensor | None  # ()


class Siglip2Task(nn.Module):
    """`task(batch) -> (losses, report)`.

    Losses by name with their sum under "loss", and scalars worth logging.

    A batch is `{"image", "text"}` (see `Siglip2.encode_image`), with optional `image_ids` (B,) and
    `text_ids` (M,) whose equal values are positives, and `image_ignore_ids` and `text_ignore_ids`
    whose equal values count nothing unless they are positives; or transformers'
    `{"pixel_values", "input_ids", ...}`.

    The text tower runs first: its embeddings cross ranks while the image tower computes, and their
    gradients come back while the image tower's backward does.

    With `cached`, `batch` is one part of a batch whose contrastive loss is known already
    (see `siglip2.train.accumulate`).

    Raises ValueError for a batch of neither form.
    """

    def __init__(self, model: Siglip2, *, loss: SigLipLoss | None = None):
        super().__init__()
        self.model = model
        self.sigmoid = loss or SigLipLoss(normalize=True)

    def forward(
        self, batch: Mapping[str, Any], *, cached: Cached | None = None
    ) -> tuple[Losses, dict[str, Tensor]]:
        batch = normalize_batch(batch)
        if cached is not None:
            return {"loss": self._known(batch, cached)}, self.report()
        sigmoid = self.contrast(batch, self.embed_text(batch), self.embed_images)
        return {"loss": sigmoid, "sigmoid_loss": sigmoid.detach()}, self.report()

    def embed_text(self, batch: Mapping[str, Any]) -> Tensor:  # (M, D)
        """What the loss takes: as the tower leaves them when the loss normalises by itself."""
        return self.model.encode_text(batch["text"], normalize=not self.sigmoid.normalize)

    def embed_images(self, batch: Mapping[str, Any]) -> Tensor:  # (B, D)
        return self.model.encode_image(batch["image"], normalize=not self.sigmoid.normalize)

    def contrast(
        self,
        batch: Mapping[str, Any],
        txt: Tensor,  # (M, D)
        embed_images: Callable[[Mapping[str, Any]], Tensor],  # runs while the texts cross ranks
        scalars: tuple[Tensor, Tensor] | None = None,  # (), () in place of the model's own
    ) -> Tensor:  # ()
        """The sigmoid loss over all ranks' pairs."""
        log_scale, bias = scalars or (self.model.log_scale, self.model.bias)
        pending = self.sigmoid.start_gather(
            txt, num_images=batch_size(batch["image"]), **_ids(batch, TEXT_IDS, txt.device)
        )
        img = embed_images(batch)
        ids = _ids(batch, IMAGE_IDS, img.device)
        return self.sigmoid(img, pending, log_scale.exp(), bias, **ids)

    def report(self) -> dict[str, Tensor]:
        """Scalars worth logging."""
        model = self.model
        return {"logit_scale": model.log_scale.detach().exp(), "logit_bias": model.bias.detach()}

    def _known(self, batch: Mapping[str, Any], cached: Cached) -> Tensor:
        """`cached.loss`, with the gradients that the whole batch gave this part's embeddings."""
        pairs = [
            (self.embed_text(batch), cached.dtxt),
            (self.embed_images(batch), cached.dimg),
            (self.model.log_scale, cached.dlog_scale),
            (self.model.bias, cached.dbias),
        ]
        dtype = torch.promote_types(cached.dtxt.dtype, torch.float32)
        inner = sum((x.to(dtype) * dx.to(dtype)).sum() for x, dx in pairs if dx is not None)
        return inner - inner.detach() + cached.loss


def _ids(batch: Mapping[str, Any], keys: tuple[str, ...], device: torch.device) -> dict:
    return {key: batch[key].to(device) for key in keys if key in batch}


def normalize_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch under our keys, whichever of the two dialects it came in."""
    if "image" in batch and "text" in batch:
        return batch
    if "pixel_values" in batch and "input_ids" in batch:
        naflex = all(key in batch for key in HF_KEYS)
        image = {key: batch[key] for key in HF_KEYS} if naflex else batch["pixel_values"]
        ids = {key: batch[key] for key in IMAGE_IDS + TEXT_IDS if key in batch}
        return {"image": image, "text": batch["input_ids"], **ids}
    raise ValueError(
        "need a batch with 'image' and 'text', or 'pixel_values' and 'input_ids';"
        f" got {sorted(batch)}"
    )
