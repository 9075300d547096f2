"""What a batch costs: the model and its objectives, under open_clip's task contract."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..losses import SigLipLoss
from ..models.inputs import HF_KEYS
from ..models.siglip2 import Siglip2


class Siglip2Task(nn.Module):
    """`task(batch) -> (losses, report)`.

    Losses by name with their sum under "loss", and scalars worth logging.

    A batch is `{"image", "text"}` (see `Siglip2.encode_image`), with optional `image_ids` (B,) and
    `text_ids` (M,) whose equal values are positives; or transformers'
    `{"pixel_values", "input_ids", ...}`.

    Raises ValueError for a batch of neither form.
    """

    def __init__(self, model: Siglip2, *, loss: SigLipLoss | None = None):
        super().__init__()
        self.model = model
        self.sigmoid = loss or SigLipLoss()

    def forward(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        batch = normalize_batch(batch)
        out = self.model(image=batch["image"], text=batch["text"])
        device = out["image_features"].device
        ids = {key: batch[key].to(device) for key in ("image_ids", "text_ids") if key in batch}
        sigmoid = self.sigmoid(
            out["image_features"],
            out["text_features"],
            out["logit_scale"],
            out["logit_bias"],
            **ids,
        )
        report = {key: out[key].detach() for key in ("logit_scale", "logit_bias")}
        return {"loss": sigmoid, "sigmoid_loss": sigmoid.detach()}, report


def normalize_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch under our keys, whichever of the two dialects it came in."""
    if "image" in batch and "text" in batch:
        return batch
    if "pixel_values" in batch and "input_ids" in batch:
        naflex = all(key in batch for key in HF_KEYS)
        image = {key: batch[key] for key in HF_KEYS} if naflex else batch["pixel_values"]
        ids = {key: batch[key] for key in ("image_ids", "text_ids") if key in batch}
        return {"image": image, "text": batch["input_ids"], **ids}
    raise ValueError(
        "need a batch with 'image' and 'text', or 'pixel_values' and 'input_ids';"
        f" got {sorted(batch)}"
    )
