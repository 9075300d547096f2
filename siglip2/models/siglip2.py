"""SigLIP 2: two towers, a temperature and a bias."""

import math

import torch
from torch import Tensor, nn

from .inputs import Images, vision_inputs
from .presets import Architecture
from .text import TextTower
from .vision import VisionOutput, VisionTower


def normalize(
    z: Tensor,  # (B, D)
) -> Tensor:  # (B, D) float32
    """z / (||z|| + 1e-8) in float32, as the released models do."""
    z = z.float()
    return z / (z.norm(dim=-1, keepdim=True) + 1e-8)


class Siglip2(nn.Module):
    """Image and text towers with the sigmoid loss's learned `log_scale` and `bias`.

    `log_scale` is the log temperature. Weights are float32; `dtype` is what
    activations are computed in.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        init_temperature: float = 10.0,
        init_bias: float = -10.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.architecture = architecture
        self.dtype = dtype
        self.vision = VisionTower(architecture.vision)
        self.text = TextTower(architecture.text)
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_temperature)))
        self.bias = nn.Parameter(torch.tensor(float(init_bias)))

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    def init_weights(self) -> None:
        self.vision.init_weights()
        self.text.init_weights()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.vision.encoder.grad_checkpointing = enable
        self.text.encoder.grad_checkpointing = enable

    def forward_vision(self, image: Images) -> VisionOutput:
        """Packed tokens and pooled embeddings of a batch; see `encode_image` for what it takes."""
        inputs = vision_inputs(image, self.architecture.vision, self.device)
        return self.vision(*inputs, self.dtype)

    def encode_image(
        self, image: Images, normalize: bool = False
    ) -> Tensor:  # (B, D); float32 when normalised
        """Embeddings of images.

        Takes an image tensor (B, 3, H, W) in [-1, 1], `PackedImages`, or timm's or transformers'
        dictionary.
        """
        return _maybe_normalize(self.forward_vision(image).pooled, normalize)

    def encode_text(
        self,
        text: Tensor,  # (B, L) int64
        normalize: bool = False,
    ) -> Tensor:  # (B, D); float32 when normalised
        """Embeddings of token ids from `get_tokenizer`.

        They are padded with 0 to the tower's length, no mask.
        """
        length = self.architecture.text.length
        if text.ndim != 2 or text.shape[1] != length or text.is_floating_point():
            raise ValueError(
                f"need token ids (B, {length}) of an integer type;"
                f" got {tuple(text.shape)} {text.dtype}."
                " Use siglip2.get_tokenizer, which pads to the tower's length"
            )
        # Only where looking costs no wait: an id out of range is a device assertion elsewhere.
        if text.device.type == "cpu" and text.numel():
            low, high, vocab_size = *map(int, text.aminmax()), self.architecture.text.vocab_size
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"need token ids from 0 to {vocab_size - 1}; got {low} to {high}."
                    " The tokenizer is not this model's: create the model with"
                    " vocab_size=tokenizer.vocab_size"
                )
        return _maybe_normalize(self.text(text.to(self.device).long(), self.dtype), normalize)

    def forward(self, image: Images | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """Unit embeddings under open_clip's keys; `logit_scale` is exponentiated."""
        out = {"logit_scale": self.log_scale.exp(), "logit_bias": self.bias}
        if image is not None:
            out["image_features"] = self.encode_image(image, normalize=True)
        if text is not None:
            out["text_features"] = self.encode_text(text, normalize=True)
        return out


def _maybe_normalize(z: Tensor, do: bool) -> Tensor:
    return normalize(z) if do else z
