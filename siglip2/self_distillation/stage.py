"""The last fifth of the recipe: a teacher, two heads, views and masks beside the image tower.

stage.begin(model.vision)                                   # at 80 % of the examples
prepared = stage.prepare(model.vision, images, generator=generator)
for branch in stage.branches:                               # one, or two with pack="branch"
    losses, report, _ = stage(model.vision, prepared, branch=branch)
    sum(losses.values()).backward()
optimizer.step()
stage.update_teacher(model.vision, examples_seen)
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..distributed import waiting_for
from ..models.inputs import Images, VisionInputs
from ..models.presets import VisionConfig
from ..models.vision import VisionOutput, VisionTower
from .config import SslConfig
from .encode import View, encode
from .heads import TaughtHead
from .losses import MaskedPredictionLoss, SelfDistillationLoss, Targets
from .masks import Masks, MaskToken, draw_masks
from .teacher import (
    Momentum,
    Pairs,
    copy_parameters,
    ema_update,
    fixed_momentum,
    frozen,
    parameter_pairs,
)
from .views import Views, draw_views

Branch = Literal["all", "masked", "local"]


class Prepared(NamedTuple):
    """Of a batch: what the student will see, and what the teacher says of it."""

    views: Views
    masks: Masks | None
    image_targets: Targets | None
    patch_targets: Targets | None
    num_images: Tensor | int  # a rank, on average
    dtype: torch.dtype  # of activations


class SslOutput(NamedTuple):
    losses: dict[str, Tensor]  # weighted: they add up
    report: dict[str, Tensor]  # scalars worth logging
    original: VisionOutput | None  # of the images that were packed with the views


class SslStage(nn.Module):
    """Heads, teacher and centres; a loss of weight 0 and its head are not built.

    The student's tower is passed to each call and is no part of this module. The teacher takes no
    gradient, is float32, and is in the state dict. With `ema_scope="heads"` the student's tower
    teaches and heads alone are averaged.

    Under FSDP2 give `teacher`, and `student` and `teacher` of each of `heads`, the `fully_shard`
    calls of the student's tower, and `mask_token` one: then `begin` and `update_teacher` work on
    local shards.

    Args:
        momentum: Of examples seen; None: `config.ema_momentum` throughout.

    Raises ValueError when no loss has a weight.
    """

    def __init__(
        self, config: SslConfig, vision: VisionConfig, *, momentum: Momentum | None = None
    ):
        super().__init__()
        width, factor = vision.size.width, config.factor(vision.size.width)
        self.config, self.vision = config, vision
        self.momentum = momentum or fixed_momentum(config.ema_momentum)
        self.distillation_weight = factor * config.distillation_weight
        self.masked_weight = factor * config.masked_weight
        names = ["image"] * (self.distillation_weight > 0) + ["patch"] * (self.masked_weight > 0)
        if not names:
            raise ValueError("need a distillation_weight or masked_weight above 0; got 0 and 0")
        if config.shared_head:
            names = ["shared"]
        self.heads = nn.ModuleDict({name: TaughtHead(width, config.head) for name in names})
        options = {
            "student_temp": config.student_temp,
            "teacher_temp": config.teacher_temp,
            "balance": config.balance,
            "centre_momentum": config.centre_momentum,
            "sinkhorn_iterations": config.sinkhorn_iterations,
        }
        K = config.head.prototypes
        self.distillation = self.masked = self.mask_token = self.teacher = None
        if self.distillation_weight > 0:
            self.distillation = SelfDistillationLoss(K, **options)
        if self.masked_weight > 0:
            self.masked = MaskedPredictionLoss(K, **options)
            self.mask_token = MaskToken(width)
        if config.ema_scope == "full":
            self.teacher = frozen(VisionTower(vision))
        self.register_buffer("has_begun", torch.zeros((), dtype=torch.bool))
        self._is_ready = False
        self.register_load_state_dict_post_hook(_notice)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What `forward` is to be called with, one after another."""
        if self.config.pack == "all":
            return ("all",)
        return ("masked",) * (self.masked is not None) + ("local",) * (
            self.distillation is not None
        )

    def begin(self, student: VisionTower) -> None:
        """Teachers become their students; nothing happens where a checkpoint brought them."""
        if not self._is_ready:
            copy_parameters(self.pairs(student))
            self.has_begun.fill_(True)
            self._is_ready = True

    def pairs(self, student: VisionTower) -> Pairs:
        """Every averaged parameter with its student's, for an optimiser that updates both."""
        self._reshard()
        pairs = Pairs([], []) if self.teacher is None else parameter_pairs(self.teacher, student)
        for head in self.heads.values():
            pairs = pairs.joined(head.pairs())
        return pairs

    def update_teacher(self, student: VisionTower, examples_seen: float) -> None:
        """After the optimiser step, with the new weights."""
        ema_update(self.pairs(student), self.momentum(examples_seen))
        self.finish_update()

    def finish_update(self, *, found_inf: Tensor | None = None) -> None:
        """What `update_teacher` does besides `pairs`, for those who update these themselves.

        Centres stay where `found_inf`, 1 or 0 on the device, is 1.
        """
        for loss in self.losses():
            loss.update_centre(found_inf=found_inf)
        self._reshard()

    def _reshard(self) -> None:
        """Of a teacher no backward frees what FSDP2 gathered: its next forward would see old
        weights, and `pairs` whole ones.
        """
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def skip_update(self) -> None:
        """In place of `update_teacher`, after a step whose gradients were dropped."""
        for loss in self.losses():
            loss.forget()

    def losses(self) -> list[SelfDistillationLoss | MaskedPredictionLoss]:
        return [loss for loss in (self.distillation, self.masked) if loss is not None]

    def _head(self, name: str) -> TaughtHead:
        return self.heads["shared" if self.config.shared_head else name]

    @torch.no_grad()
    def prepare(
        self,
        student: VisionTower,
        images: Images,
        *,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> Prepared:
        """Draw views and masks, and ask the teacher.

        Args:
            images: Any dialect of `siglip2.models.inputs`, or uint8 (B, 3, H, W).
            generator: On the device of the tower.
            dtype: Of activations.

        Raises ValueError before `begin`, and for a generator of another device.
        """
        here = student.posemb.device
        if generator.device.type != here.type:
            raise ValueError(
                f"need a generator of the tower's device, {here}; got one of {generator.device}."
                f" Use torch.Generator('{here}')"
            )
        local = self.distillation is not None
        views = draw_views(images, self.config.views, self.vision, generator, local=local)
        masks = None
        if self.masked is not None:
            grids = views.global_view.grid_hw.tolist()
            layout, share = self.config.mask_layout, self.config.mask_share
            masks = draw_masks(grids, share, generator=generator, layout=layout)
        return self.ask(student, views, masks, dtype=dtype)

    @torch.no_grad()
    def ask(
        self,
        student: VisionTower,
        views: Views,
        masks: Masks | None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Prepared:
        """As `prepare`, of views and masks that are there already."""
        if not self._is_ready:
            raise ValueError("need a teacher that was initialised; call stage.begin(tower) first")
        tower = student if self.teacher is None else self.teacher
        seen = tower(*views.global_view, dtype)
        image_targets = patch_targets = None
        if self.distillation is not None:
            image_targets = self.distillation.targets(self._head("image").teach(seen.pooled))
        if self.masked is not None:
            tokens = seen.tokens
            if self._only_hidden:
                tokens = tokens.index_select(0, masks.index)
            patch_targets = self.masked.targets(self._head("patch").teach(tokens))
        num_images = _mean_over_ranks(len(views.global_view.grid_hw), seen.pooled.device)
        return Prepared(views, masks, image_targets, patch_targets, num_images, dtype)

    @property
    def _only_hidden(self) -> bool:
        """Whether the masked loss compares hidden patches alone."""
        return self.config.loss_tokens == "masked"

    def forward(
        self,
        student: VisionTower,
        prepared: Prepared,
        *,
        branch: Branch = "all",
        original: VisionInputs | None = None,
    ) -> SslOutput:
        """Losses of a pass of the student over its views.

        Args:
            branch: "all" packs all views into one pass; the others are passes of their own, whose
                backwards hold a third of the activations and add up to the same gradients.
            original: The images as they are, packed with the views of `branch`, for other losses.
        """
        is_masked = self.masked is not None and branch in ("all", "masked")
        views = prepared.views
        has_local = branch in ("all", "local") and views.local_views is not None
        seen = [] if original is None else [View(original)]
        if is_masked:
            seen.append(View(views.global_view, prepared.masks, self._only_hidden))
        if has_local:
            seen.append(View(views.local_views))
        token = self.mask_token() if is_masked else None
        outputs = iter(encode(student, seen, prepared.dtype, token))
        losses, report = {}, {}
        whole = None if original is None else next(outputs)
        if is_masked:
            loss = self._masked_loss(next(outputs).tokens, prepared)
            losses["masked_loss"] = self.masked_weight * loss
            report |= _spread("patch", prepared.patch_targets.z)
        if has_local:
            z = self._head("image")(next(outputs).pooled)
            targets, num_images = prepared.image_targets, prepared.num_images
            loss = self.distillation(z, targets, num_images=num_images)
            losses["distillation_loss"] = self.distillation_weight * loss
            report |= _spread("image", targets.z)
        return SslOutput(losses, report, whole)

    def _masked_loss(self, tokens: Tensor, prepared: Prepared) -> Tensor:  # (S, D) -> ()
        masks = prepared.masks
        if self._only_hidden:
            weight = masks.hidden_weights()
        else:
            weight = masks.all_weights(self.config.visible_weight)
        z = self._head("patch")(tokens)
        targets, num_images = prepared.patch_targets, prepared.num_images
        return self.masked(z, targets, weight=weight, num_images=num_images)


@torch.no_grad()
def _spread(name: str, z: Tensor) -> dict[str, Tensor]:  # (S, D) unit rows
    """1 - |mean row|^2: near 0 when a teacher gives all one answer. A single row has none."""
    found = 1 - z.float().mean(0).square().sum()
    return {f"{name}_teacher_spread": found} if len(z) > 1 else {}


def _mean_over_ranks(count: int, device: torch.device) -> Tensor | int:
    """Nothing waits for the device."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    total = torch.full((), float(count), device=device)
    with waiting_for("the number of images"):
        dist.all_reduce(total)
    return total / dist.get_world_size()


def _notice(stage: SslStage, _: object) -> None:
    """Once a load: the flag of the state dict as a Python one, which costs no look at a device."""
    stage._is_ready = bool(stage.has_begun)
