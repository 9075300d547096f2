"""What a batch costs: the model and its objectives, under open_clip's task contract."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import gather_counts
from ..locca import LocCaLoss
from ..locca.packing import PackedTexts, Totals, count_texts
from ..locca.tasks import TASKS, TaskText
from ..losses import SigLipLoss
from ..models.inputs import HF_KEYS, batch_size, token_counts, vision_inputs
from ..models.siglip2 import Siglip2, normalize
from ..models.vision import VisionOutput
from ..self_distillation import SslOutput, SslStage

IMAGE_IDS = ("image_ids", "image_ignore_ids")
TEXT_IDS = ("text_ids", "text_ignore_ids")
TASK_TEXTS = ("task_texts", "task_totals")
VIEWS = ("view_seed", "prepared")
_OPTIONAL = IMAGE_IDS + TEXT_IDS + TASK_TEXTS + VIEWS

Losses = dict[str, Tensor]
Pass = Literal["all", "original", "masked", "local"]


class Cached(NamedTuple):
    """The contrastive loss of a whole batch, as one part of that batch must know it.

    dlog_scale and dbias are None in all parts but one.
    """

    loss: Tensor  # () this part's share of the value
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

    With `locca`, a batch brings "task_texts" (`siglip2.locca.TextDraws`), and the decoder reads the
    tokens of the pass whose pooled embeddings the sigmoid loss takes. Its means are over the texts
    of all ranks, as the mean of the ranks' losses.

    With `ssl`, the last fifth of the recipe (`SslStage`, begun already), the decoder and the
    sigmoid loss see the images as they are, and the stage's losses views of them that the batch's
    "view_seed" decides. `passes` names what a step calls, one after another: everything in one
    packed pass, or a pass and a backward for each kind of view (`ssl.config.pack`).

    With `cached`, `batch` is one part of a batch whose contrastive loss is known already
    (see `siglip2.train.accumulate`).

    Args:
        locca_weight: Of the decoder's loss beside the sigmoid loss (SigLIP 2, section 2.2: equal).

    Raises ValueError for a batch of neither form, or without the texts that a decoder needs or the
    seed that views need.
    """

    def __init__(
        self,
        model: Siglip2,
        *,
        loss: SigLipLoss | None = None,
        locca: LocCaLoss | None = None,
        locca_weight: float = 1.0,
        ssl: SslStage | None = None,
    ):
        super().__init__()
        self.model = model
        self.sigmoid = loss or SigLipLoss(normalize=True)
        self.locca, self.locca_weight = locca, locca_weight
        self.ssl = ssl

    @property
    def passes(self) -> tuple[Pass, ...]:
        if self.ssl is None or self.ssl.config.pack == "all":
            return ("all",)
        return (*self.ssl.branches, "original")

    def forward(
        self, batch: Mapping[str, Any], *, cached: Cached | None = None, only: Pass = "all"
    ) -> tuple[Losses, dict[str, Tensor]]:
        batch = self.prepared(batch)
        if only in ("masked", "local"):
            taught = self.ssl(self.model.vision, batch["prepared"], branch=only)
            return _summed(taught.losses), taught.report
        if cached is not None:
            seen = self._see(batch, only)
            total, losses = self._known(batch, seen.original, cached), {}
        else:
            looks: list[SslOutput] = []

            def embed_images(batch: Mapping[str, Any]) -> Tensor:
                looks.append(self._see(batch, only))
                return self.pooled(looks[0].original)

            total = self.contrast(batch, self.embed_text(batch), embed_images)
            [seen], losses = looks, {"sigmoid_loss": total.detach()}
        report = {**self.report(), **seen.report}
        if self.locca is not None:
            said = self.locca(seen.original.tokens, self._texts(batch))
            losses["locca_loss"] = said.loss.detach()
            report["token_accuracy"] = said.token_accuracy
            total = total + self.locca_weight * said.loss
        losses = {"loss": total, **losses}
        if seen.losses:
            losses |= _summed(seen.losses, total)
        if only == "original":
            trained = [p for p in self.ssl.parameters() if p.requires_grad]
            losses["loss"] = _Visited.apply(losses["loss"], *trained)
        return losses, report

    def prepared(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of either dialect under our keys, with what the teacher says of it."""
        batch = normalize_batch(batch)
        if self.ssl is None or "prepared" in batch:
            return batch
        if "view_seed" not in batch:
            raise ValueError(
                "need a batch with 'view_seed', the number that views and masks are drawn from;"
                f" got {sorted(batch)}"
            )
        model, generator = self.model, torch.Generator(self.model.device)
        generator.manual_seed(batch["view_seed"])
        images, dtype = batch["image"], model.dtype
        said = self.ssl.prepare(model.vision, images, generator=generator, dtype=dtype)
        return {**batch, "prepared": said}

    def _see(self, batch: Mapping[str, Any], only: Pass) -> SslOutput:
        """The image tower on the images, and in the same pass on all views."""
        model = self.model
        if self.ssl is None or only == "original":
            return SslOutput({}, {}, model.forward_vision(batch["image"]))
        images = vision_inputs(batch["image"], model.architecture.vision, model.device)
        return self.ssl(model.vision, batch["prepared"], original=images)

    def embed_text(self, batch: Mapping[str, Any]) -> Tensor:  # (M, D)
        """What the loss takes: as the tower leaves them when the loss normalises by itself."""
        return self.model.encode_text(batch["text"], normalize=not self.sigmoid.normalize)

    def embed_images(self, batch: Mapping[str, Any]) -> Tensor:  # (B, D)
        return self.pooled(self.model.forward_vision(batch["image"]))

    def pooled(self, vision: VisionOutput) -> Tensor:  # (B, D)
        return vision.pooled if self.sigmoid.normalize else normalize(vision.pooled)

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

    def _texts(self, batch: Mapping[str, Any]) -> PackedTexts:
        if "task_texts" not in batch:
            raise ValueError(
                "need a batch with 'task_texts' for the captioning decoder: lists of"
                f" siglip2.locca.TaskText, one an image; got {sorted(batch)}"
            )
        return self.locca.pack_tokens(
            batch["task_texts"],
            token_counts(batch["image"], self.model.architecture.vision),
            totals=batch.get("task_totals") or task_totals(batch["task_texts"], self.model.device),
            device=self.model.device,
        )

    def _known(self, batch: Mapping[str, Any], vision: VisionOutput, cached: Cached) -> Tensor:
        """`cached.loss`, with the gradients that the whole batch gave this part's embeddings."""
        pairs = [
            (self.embed_text(batch), cached.dtxt),
            (self.pooled(vision), cached.dimg),
            (self.model.log_scale, cached.dlog_scale),
            (self.model.bias, cached.dbias),
        ]
        dtype = torch.promote_types(cached.dtxt.dtype, torch.float32)
        inner = sum((x.to(dtype) * dx.to(dtype)).sum() for x, dx in pairs if dx is not None)
        return inner - inner.detach() + cached.loss


def _summed(losses: Losses, total: Tensor | float = 0.0) -> Losses:
    """`losses` without their graphs, and under "loss" their sum and `total`."""
    for loss in losses.values():
        total = total + loss
    return {"loss": total, **{name: loss.detach() for name, loss in losses.items()}}


class _Visited(torch.autograd.Function):
    """`loss`, whose backward comes by parameters that earlier passes of the step have trained.

    DDP sends gradients with the last pass, and waits there for every parameter's.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.num_parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return dloss, *[None] * ctx.num_parameters


def task_totals(texts: Sequence[Sequence[TaskText]], device: torch.device) -> Totals:
    """What means over the texts of all ranks divide by, a rank: their gradients are averaged."""
    mine = count_texts(texts)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    counts = (*mine.texts.values(), *mine.tokens.values())
    rows = gather_counts(counts, device, None)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    half = len(TASKS)
    return Totals(*(dict(zip(TASKS, x, strict=True)) for x in (means[:half], means[half:])))


def _ids(batch: Mapping[str, Any], keys: tuple[str, ...], device: torch.device) -> dict:
    return {key: batch[key].to(device) for key in keys if key in batch}


def normalize_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch under our keys, whichever of the two dialects it came in."""
    if "image" in batch and "text" in batch:
        return batch
    if "pixel_values" in batch and "input_ids" in batch:
        naflex = all(key in batch for key in HF_KEYS)
        image = {key: batch[key] for key in HF_KEYS} if naflex else batch["pixel_values"]
        more = {key: batch[key] for key in _OPTIONAL if key in batch}
        return {"image": image, "text": batch["input_ids"], **more}
    raise ValueError(
        "need a batch with 'image' and 'text', or 'pixel_values' and 'input_ids';"
        f" got {sorted(batch)}"
    )
