"""What a run would take of each device and of the network, before any device is there.

The step of the real task runs on fake tensors (shapes on the meta device, no memory) over a fake
process group, and is watched op by op (`step_record`). Run that way, over the asked number of
ranks: the towers, the loss with its gather, accumulation, clipping and AdamW. Run over few ranks,
with sizes and hops worked out for the asked number: FSDP2 and the ring, whose own work grows with
the ranks. Arithmetic alone: DDP, which wants real memory; its buckets come from DDP's own
assignment. All are tested against real processes.

Nothing is read, downloaded, sent or written.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from ..config import Config
from ..errors import ConfigError
from ..models.presets import Architecture
from . import parallel, setup
from .fake_step import fake_batch, fake_ranks, fake_step, known_lengths
from .step_record import LOSS, LOSS_TRAFFIC, Collective, StepRecord, record_step
from .task import Siglip2Task

_FLOAT32 = 4  # bytes of a weight, of its gradient and of either AdamW moment
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = dist._DEFAULT_FIRST_BUCKET_BYTES, 25 << 20  # DDP's defaults
_FSDP_RANKS, _RING_RANKS = 2, 4


class Sizes(NamedTuple):
    """Numbers of parameters."""

    vision: int
    text: int
    token_table: int  # part of the text tower
    scalars: int
    decoder: int = 0
    stage: int = 0  # heads and mask token of self-distillation
    teacher: int = 0  # without gradient and optimiser state, so not in `total`

    @property
    def total(self) -> int:
        return self.vision + self.text + self.decoder + self.stage + self.scalars


class DryRun(NamedTuple):
    """One device of the run and one of its steps; the fullest device, where shards differ."""

    config: Config
    architecture: Architecture
    world_size: int
    whole: Sizes
    local: Sizes  # what one device keeps
    step: StepRecord  # collectives are those of the strategy, too
    strategy_bytes: int  # DDP's buckets, or what FSDP2 gathers and is about to scatter
    batch_bytes: int


def parse_world_size(text: str) -> int:
    """Raises ConfigError."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"--world-size: need the number of processes, 1 or more; got {text!r}."
            " One process drives one device"
        )
    return int(text)


def dry_run(config: Config, *, world_size: int) -> DryRun:
    """Count a step of `config` on `world_size` devices.

    Raises ConfigError for settings that cannot work, and in a process that torchrun's ranks or
    another process group has joined.
    """
    setup.check(config)
    if dist.is_initialized():
        raise ConfigError(
            "--dry-run: need a process without a process group; got one that has joined"
            f" {dist.get_world_size()} ranks. Start it by itself, and pass --world-size"
        )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    is_sharded = world_size > 1 and config.dist.strategy == "fsdp"
    is_long_ring = config.dist.loss == "ring" and world_size > _RING_RANKS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = _watch(config, fake, _RING_RANKS if is_long_ring else world_size)
        sharded = _watch(config, fake, _FSDP_RANKS, is_sharded=True) if is_sharded else None
    record = _longer_ring(seen.record, world_size) if is_long_ring else seen.record
    collectives, strategy_bytes = list(record.collectives), 0
    if sharded is not None:
        groups = _groups(sharded.task)
        collectives = [c for c in collectives if c.what in LOSS_TRAFFIC]
        collectives += _resized(sharded.record.collectives, groups, world_size)
        strategy_bytes = _fsdp_bytes(groups, world_size, config.train.accum_steps)
    elif world_size > 1:
        collectives += [Collective("gradients (DDP)", "all-reduce", n) for n in seen.buckets]
        strategy_bytes = sum(seen.buckets)
    return DryRun(
        config,
        seen.task.model.architecture,
        world_size,
        _sizes(seen.task, 1),
        _sizes(seen.task, world_size if is_sharded else 1),
        record._replace(collectives=collectives),
        strategy_bytes,
        seen.batch_bytes,
    )


class _Watched(NamedTuple):
    task: Siglip2Task
    record: StepRecord
    batch_bytes: int
    buckets: list[int]


def _watch(
    config: Config, fake: FakeTensorMode, num_ranks: int, *, is_sharded: bool = False
) -> _Watched:
    """A step of the unwrapped task, or of FSDP2's."""
    with fake_ranks(num_ranks):
        step = fake_step(config, fake, is_sharded=is_sharded)
        task = parallel.unwrapped(step.task)
        with fake:
            batch, known = fake_batch(config, task.model.architecture)
            with known_lengths():
                record = record_step(step, batch, known=known)
            buckets = [] if is_sharded else _buckets(record.ready)
    return _Watched(task, record, _num_bytes(batch), buckets)


def _num_bytes(batch: Mapping[str, Any]) -> int:
    found = [y for x in batch.values() for y in (x if isinstance(x, tuple) else (x,))]
    return sum(x.nbytes for x in found if isinstance(x, torch.Tensor))


def _longer_ring(record: StepRecord, world_size: int) -> StepRecord:
    """A step over `_RING_RANKS` ranks with the hops of `world_size`.

    A text block and its ids go one hop less than there are ranks, a gradient as many. The 28 bytes
    of counts and scalars that a hop keeps are left out of the loss's memory.
    """
    collectives = []
    for c in record.collectives:
        if c.kind == "all-gather":  # of row counts
            c = c._replace(num_bytes=c.num_bytes // _RING_RANKS * world_size)
        collectives.append(c)
    for c, number in Counter(c for c in collectives if c.kind == "send").items():
        collectives += [c] * (-(-number // _RING_RANKS) * (world_size - _RING_RANKS))
    flops = {**record.flops, LOSS: record.flops[LOSS] // _RING_RANKS * world_size}
    return record._replace(collectives=collectives, flops=flops)


def _sizes(task: Siglip2Task, num_shards: int) -> Sizes:
    """Of the rank that has most: FSDP2 cuts along the first dimension, rounded up."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(_shard_numel(p, num_shards) for p in parameters)

    model, locca, ssl = task.model, task.locca, task.ssl
    of_stage = [] if ssl is None else list(ssl.parameters())
    return Sizes(
        vision=size(model.vision.parameters()),
        text=size(model.text.parameters()),
        token_table=size([model.text.token_embed]),
        scalars=sum(p.numel() for p in model.parameters(recurse=False)),
        decoder=0 if locca is None else size(locca.decoder.parameters()),
        stage=size(p for p in of_stage if p.requires_grad),
        teacher=size(p for p in of_stage if not p.requires_grad),
    )


def _shard_numel(p: nn.Parameter, num_shards: int) -> int:
    rows = p.shape[0]
    return -(-rows // num_shards) * (p.numel() // rows)


def _buckets(ready: list[nn.Parameter]) -> list[int]:
    """Bytes of DDP's buckets from its second step on, which follow the order of the gradients."""
    if not ready:
        return []
    indices, _ = dist._compute_bucket_assignment_by_size(
        ready, [_FIRST_BUCKET_BYTES, _BUCKET_BYTES], [False] * len(ready)
    )
    return [sum(ready[i].nbytes for i in bucket) for bucket in indices]


class _Group(NamedTuple):
    """Weights that FSDP2 gathers together."""

    shapes: tuple[torch.Size, ...]
    is_root: bool  # stays gathered from the forward to the end of the backward

    def gathered_bytes(self, num_ranks: int) -> int:
        rows = (-(-shape[0] // num_ranks) * num_ranks * shape[1:].numel() for shape in self.shapes)
        return _FLOAT32 * sum(rows)


def _groups(model: nn.Module) -> list[_Group]:
    groups, seen = [], set()
    units = [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    for name, unit in reversed(units):  # inner ones first
        own = [p for p in unit.parameters() if p not in seen]
        seen.update(own)
        is_root = not any(name.startswith(f"{other}.") for other, _ in units)
        groups.append(_Group(tuple(p.shape for p in own), is_root))
    return groups


def _resized(
    collectives: list[Collective], groups: list[_Group], world_size: int
) -> list[Collective]:
    """FSDP2's step over `_FSDP_RANKS` ranks with shards for `world_size`; its loss left out."""
    sizes = {g.gathered_bytes(_FSDP_RANKS): g.gathered_bytes(world_size) for g in groups}
    return [
        c._replace(num_bytes=sizes[c.num_bytes]) if c.what.endswith("(FSDP2)") else c
        for c in collectives
        if c.what not in LOSS_TRAFFIC
    ]


def _fsdp_bytes(groups: list[_Group], world_size: int, accum_steps: int) -> int:
    """Gathered: what a tower holds outside its blocks, one block in use, one on its way. To be
    scattered: the larger tower's own gradients and the copy that is sent; with several parts
    a step, the gradients of all weights wait for the last."""
    roots = [g.gathered_bytes(world_size) for g in groups if g.is_root]
    blocks = [g.gathered_bytes(world_size) for g in groups if not g.is_root]
    waiting = sum(roots) + sum(blocks) if accum_steps > 1 else max(roots)
    return sum(roots) + 2 * max(blocks, default=0) + waiting + max(roots)
