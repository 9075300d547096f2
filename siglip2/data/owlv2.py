"""OWLv2 of transformers as a detector: `detect(image, phrases)`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from siglip2.errors import CheckpointError, ConfigError, require

if TYPE_CHECKING:
    from PIL.Image import Image


class Owlv2:
    """An OWLv2 model and its processor, from a folder that `save_pretrained` wrote.

    The picture goes through the vision tower once, whatever the number of phrases. Each box is
    given to the phrase that scores best for it. Phrases longer than the text tower takes (16 tokens
    in the released models) are not asked.

    Args:
        prompt: What a phrase is put into, such as "a photo of a {}".
        threshold: Lower scores are not returned.
        phrases_at_a_time: Through the text tower.
        device: None: a GPU where there is one.
        dtype: Of the model; float16 moves a box by up to half a pixel of its 960.

    Raises CheckpointError: the folder holds no OWLv2 model. MissingDependencyError: transformers is
    not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        prompt: str = "{}",
        threshold: float = 0.0,
        phrases_at_a_time: int = 256,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        transformers = require("transformers", "boxes")
        if not transformers.utils.is_torchvision_available():
            require("scipy", "boxes")  # what its processor resizes with then
        if "{}" not in prompt:
            raise ConfigError(f"need a prompt with {{}} where the phrase goes; got {prompt!r}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        local = {"local_files_only": True}
        try:
            self.processor = transformers.Owlv2Processor.from_pretrained(folder, **local)
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            if config.model_type != "owlv2":
                raise ValueError(f"it is a model of the type {config.model_type!r}")
            model = transformers.Owlv2ForObjectDetection.from_pretrained(
                folder, dtype=dtype, **local
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"need a folder with an OWLv2 model and its processor; {folder}: {reason}"
            ) from error
        self.model = model.to(self.device).eval()
        self.prompt, self.threshold = prompt, threshold
        self.phrases_at_a_time = phrases_at_a_time
        self._length = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(
        self, image: "Image", phrases: Sequence[str]
    ) -> Iterator[tuple[int, float, list[float]]]:
        """(index of the phrase, score, x0, y0, x1, y1 in pixels), by place on the model's grid."""
        texts = [self.prompt.format(phrase) for phrase in phrases]
        ids = self.processor.tokenizer(texts)["input_ids"] if texts else []
        short = [i for i, tokens in enumerate(ids) if len(tokens) <= self._length]
        if not short:
            return iter(())
        embeddings = self._text_embeddings([texts[i] for i in short])
        found = self._found(image, embeddings)
        columns = (found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist())
        return ((short[i], score, box) for i, score, box in zip(*columns, strict=True))

    def _text_embeddings(self, texts: list[str]) -> torch.Tensor:  # (1, N, D)
        parts = []
        for start in range(0, len(texts), self.phrases_at_a_time):
            part = texts[start : start + self.phrases_at_a_time]
            options = {"padding": "max_length", "max_length": self._length, "return_tensors": "pt"}
            tokens = self.processor.tokenizer(part, **options).to(self.device)
            output = self.model.owlv2.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            features = getattr(output, "pooler_output", output)
            parts.append(features / features.norm(dim=-1, keepdim=True))
        return torch.cat(parts)[None]

    def _found(self, image: "Image", embeddings: torch.Tensor) -> dict[str, Any]:
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        features, _ = self.model.image_embedder(pixels.to(self.device, self.model.dtype))
        rows = features.flatten(1, 2)  # (1, patches, D)
        logits, _ = self.model.class_predictor(rows, embeddings.to(rows.dtype))
        boxes = self.model.box_predictor(rows, features)
        outputs = SimpleNamespace(logits=logits.float().cpu(), pred_boxes=boxes.float().cpu())
        # The processor pads pictures to squares below and on the right; its boxes are shares of the
        # square, and `target_sizes` takes them back to pixels of the picture.
        [found] = self.processor.post_process_grounded_object_detection(
            outputs, threshold=self.threshold, target_sizes=[(image.height, image.width)]
        )
        return found
