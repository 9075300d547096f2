"""The last fifth of the recipe in a run: built when it begins, its teacher moved by every step."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from siglip2_kernels.fused_adamw import average

from ..config import Config, SelfDistillationConfig
from ..models.presets import VisionConfig
from ..models.vision import VisionTower
from ..self_distillation import HeadConfig, SslConfig, SslStage, ViewConfig
from .fused_adamw import FusedAdamW
from .optim import add_parameters
from .parallel import unwrapped, wrap_again

# Of a teacher's spread, 1 - |mean row|^2. Heads that learn the scenes stay above 0.8; one that
# gave up passed this within 100 steps.
COLLAPSED = 0.02


def is_wanted(ssl: SelfDistillationConfig) -> bool:
    return ssl.distillation_weight > 0 or ssl.masked_weight > 0


def begins_at(config: Config) -> float:
    """Examples seen before the first step of the stage; infinity where no loss has a weight."""
    return config.ssl.start_share * config.train.examples if is_wanted(config.ssl) else math.inf


def stage_config(ssl: SelfDistillationConfig) -> SslConfig:
    """The run's knobs among all of the stage's."""
    views = ViewConfig(num_local=ssl.num_local)
    return SslConfig(
        start_share=ssl.start_share,
        distillation_weight=ssl.distillation_weight,
        masked_weight=ssl.masked_weight,
        size_factor=ssl.size_factor,
        balance=ssl.balance,
        ema_momentum=ssl.ema_momentum,
        ema_scope=ssl.ema_scope,
        mask_layout=ssl.mask_layout,
        pack=ssl.pack,
        head=HeadConfig(
            hidden_width=ssl.hidden_width, bottleneck=ssl.bottleneck, prototypes=ssl.prototypes
        ),
        views=views if ssl.photometric else views.crops_alone(),
    )


def build_stage(config: Config, vision: VisionConfig, device: torch.device) -> SslStage:
    """Its random weights are the seed's alone: the same in a run that was resumed before it."""
    settings = stage_config(config.ssl)
    if device.type == "meta":
        with device:
            return SslStage(settings, vision)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        return SslStage(settings, vision).to(device)


def begin_stage(task: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> nn.Module:
    """`task` with the stage, wrapped anew; the optimiser keeps the state of all it had."""
    inner = unwrapped(task)
    model = inner.model
    inner.ssl = stage = build_stage(config, model.architecture.vision, model.device)
    if config.train.compile and stage.teacher is not None:
        stage.teacher.compile()
    task = wrap_again(task, config.dist.strategy)
    add_parameters(optimizer, stage, config.optim)
    if isinstance(optimizer, FusedAdamW):
        for teacher, student in _taught(stage, model.vision):
            for taught, mine in zip(teacher.parameters(), student.parameters(), strict=True):
                optimizer.attach(mine, teacher=taught)
    stage.begin(model.vision)
    return task


def describe_stage(task: nn.Module, step: int) -> str:
    """One line for the console."""
    stage = unwrapped(task).ssl
    trained, kept = (
        sum(p.numel() for p in stage.parameters() if p.requires_grad is mine) / 1e6
        for mine in (True, False)
    )
    names = {"self-distillation": stage.distillation, "masked prediction": stage.masked}
    losses = " and ".join(name for name, loss in names.items() if loss is not None)
    return (
        f"{losses} after step {step:,}: {trained:.1f} M parameters more,"
        f" {kept:.1f} M in the teacher"
    )


class CollapseNotice:
    """A line for the console, once, when a teacher gives all that it is asked one answer.

    Its loss stands still then and looks like one that has converged.
    """

    def __init__(self):
        self._silent = ["image", "patch"]  # of which nothing has been said

    def __call__(self, row: Mapping[str, float]) -> list[str]:
        """Of a row of `metrics.jsonl`."""
        spreads = {kind: row.get(f"train/{kind}_teacher_spread", 1.0) for kind in self._silent}
        collapsed = {kind: spread for kind, spread in spreads.items() if spread < COLLAPSED}
        self._silent = [kind for kind in self._silent if kind not in collapsed]
        return [
            f"the {kind}-level teacher gives nearly one answer to all (spread {spread:.3f} of 1):"
            " its loss teaches nothing any more. Try --ssl.balance sinkhorn, an --ssl.ema_momentum"
            " nearer to 1, or --ssl.photometric false where views are of flat pictures"
            for kind, spread in collapsed.items()
        ]


def _taught(stage: SslStage, student: VisionTower) -> list[tuple[nn.Module, nn.Module]]:
    towers = [] if stage.teacher is None else [(stage.teacher, student)]
    return [*towers, *((head.teacher, head.student) for head in stage.heads.values())]


def update_teacher(
    stage: SslStage,
    student: VisionTower,
    optimizer: torch.optim.Optimizer,
    *,
    momentum: float,
    found_inf: Tensor,  # () 1 where the step was dropped: then teacher and centres stay
) -> None:
    """After the optimiser step, whatever it was. Nothing waits for the device."""
    if not isinstance(optimizer, FusedAdamW):  # that one has averaged in its own pass
        average(*stage.pairs(student), momentum=momentum, found_inf=found_inf)
    stage.finish_update(found_inf=found_inf)


def view_seed(seed: int, rank: int, step: int) -> int:
    """What views and masks of a rank's batch are drawn from."""
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0] >> 1)
