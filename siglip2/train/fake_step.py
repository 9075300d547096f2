"""A training step on fake tensors, built as the trainer builds it: no memory, data or ranks."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import Config
from ..data.types import PackedImages
from ..locca import packing
from ..locca.tasks import TASKS, TaskText
from ..models import sequences
from ..models.presets import Architecture, architecture
from . import parallel, setup
from .optim import adamw
from .ssl_stage import build_stage, is_wanted
from .step import TrainStep
from .task import Siglip2Task


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """A process group that answers at once and sends nothing; none for one rank."""
    if world_size == 1:
        yield
        return
    import_module("torch.distributed._tools.fake_collectives")  # registers collectives of fakes
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_step(config: Config, fake: FakeTensorMode, *, is_sharded: bool) -> TrainStep:
    """The step as the trainer builds it, made on the meta device and then put on a fake CPU."""
    asked = replace(config.model, pretrained=None)
    vocab_size = architecture(asked.name).text.vocab_size
    model = setup.build_model(replace(config, model=asked), vocab_size, torch.device("meta"))
    model.set_grad_checkpointing(asked.grad_checkpointing)
    # The first step's comparison of shapes is no part of the others.
    task = setup.build_task(model, replace(config, dist=replace(config.dist, check_shapes=False)))
    if task.locca is not None:
        task.locca.decoder.grad_checkpointing = asked.grad_checkpointing
    if is_wanted(config.ssl):
        task.ssl = build_stage(config, model.architecture.vision, torch.device("meta"))
    with fake:
        for name, scalar in model.named_parameters(recurse=False):
            setattr(model, name, nn.Parameter(torch.empty(scalar.shape, device="cpu")))
    if is_sharded:
        with _sharding_on_cpu():
            parallel.wrap(task, "fsdp")
    with fake:
        for part in weighty_parts(task):
            part.to_empty(device="cpu")
        if task.ssl is not None:
            task.ssl.begin(model.vision)
    return TrainStep(
        task,
        adamw(task, config.optim),
        grad_clip_norm=config.optim.grad_clip_norm,
        accum_steps=config.train.accum_steps,
    )


def weighty_parts(task: Siglip2Task) -> list[nn.Module]:
    """What holds the task's weights, but for the scalars."""
    decoder = [] if task.locca is None else [task.locca.decoder]
    stage = [] if task.ssl is None else [task.ssl]
    return [task.model.vision, task.model.text, *decoder, *stage]


@contextmanager
def known_lengths() -> Iterator[None]:
    """Where sequences of different lengths lie is worked out on real numbers."""
    original = sequences.make_plan

    def make_plan(*args, **options):
        with torch._C._DisableTorchDispatch():
            return original(*args, **options)

    sequences.make_plan = packing.make_plan = make_plan
    try:
        yield
    finally:
        sequences.make_plan = packing.make_plan = original


@contextmanager
def _sharding_on_cpu() -> Iterator[None]:
    """FSDP2 by itself would take the devices of this machine, if it has any."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    original = parallel.fully_shard
    parallel.fully_shard = partial(original, mesh=mesh)
    try:
        yield
    finally:
        parallel.fully_shard = original


def fake_batch(
    config: Config, arch: Architecture
) -> tuple[Mapping[str, Any], list[tuple[Tensor, list]]]:
    """A fake batch of one device, shaped as the loader's, and its numbers that the host looks at.

    NaFlex images have all the patches allowed, texts for the decoder all their tokens.
    """
    known = []
    B, M = config.train.batch_size, config.train.batch_size * config.data.captions_per_image
    vision = arch.vision
    if vision.is_naflex:
        N = max(config.data.patch_budgets, default=config.data.max_num_patches)
        h = next(h for h in range(math.isqrt(N), 0, -1) if N % h == 0)
        grid_hw = torch.empty(B, 2, dtype=torch.int32)
        known.append((grid_hw, [h, N // h] * B))
        image = PackedImages(
            torch.empty(B * N, 3 * vision.patch_size**2, dtype=torch.uint8),
            grid_hw,
            torch.arange(B + 1, dtype=torch.int32) * N,
            N,
        )
    else:
        image = torch.empty(B, 3, vision.image_size, vision.image_size)
    batch = {
        "image": image,
        "text": torch.empty(M, arch.text.length, dtype=torch.int64),
        "image_ids": torch.empty(B, dtype=torch.int64),
        "text_ids": torch.empty(M, dtype=torch.int64),
        "view_seed": 0,
    }
    if config.locca.weight:
        full = (0,) * config.locca.length
        batch["task_texts"] = [[TaskText(task, full, 1) for task in TASKS]] * B
    return batch, known
