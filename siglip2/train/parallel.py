"""torchrun's ranks.

Process group, DDP or FSDP2 around the task, and full weights back from either.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..models.decoder import Decoder
from ..models.siglip2 import Siglip2
from ..self_distillation import SslStage
from .task import Siglip2Task

Strategy = Literal["ddp", "fsdp"]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def init_distributed(*, timeout_s: float) -> torch.device:
    """Join the process group if torchrun started this process; pick this rank's device.

    `timeout_s` is how long a collective may take.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # Host tensors travel too: what ranks tell one another about folders and checkpoints.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


def on_every_rank(value: Any) -> list[Any]:
    """All ranks' `value`, in rank order; anything that pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wrap(task: Siglip2Task, strategy: Strategy) -> nn.Module:
    """The task, averaging gradients over ranks; itself when there is one rank."""
    if world_size() == 1:
        return task
    if strategy == "ddp":
        return _ddp(task)
    return _fsdp(task)


def wrap_again(task: nn.Module, strategy: Strategy) -> nn.Module:
    """What `wrap` gave, after its task got a stage of self-distillation."""
    inner = unwrapped(task)
    if world_size() == 1:
        return task
    if strategy == "ddp":
        task._remove_autograd_hooks()  # else the old wrapper sends gradients too
        return _ddp(inner)
    _shard_stage(inner.ssl)
    return task


def _ddp(task: Siglip2Task) -> nn.Module:
    # Without device_ids: DDP would move a batch's host sizes to the device as well.
    return nn.parallel.DistributedDataParallel(task)


def _fsdp(task: Siglip2Task) -> nn.Module:
    """Blocks and towers sharded, each tower a root of its own.

    Weights are touched in a tower's forward only, so `encode_image`, `encode_text` and
    `forward_vision` work whoever calls them, in the task's forward or out of it.
    """
    model = task.model
    for tower in (model.vision, model.text):
        _shard_tower(tower)
    if task.locca is not None:
        for block in task.locca.decoder.blocks:
            fully_shard(block)
        fully_shard(task.locca.decoder)
    # FSDP2 cannot shard 0-D parameters: the two scalars stay whole and average their gradients
    # here.
    for scalar in (model.log_scale, model.bias):
        scalar.register_post_accumulate_grad_hook(_average)
    if task.ssl is not None:
        _shard_stage(task.ssl)
    return task


def _shard_tower(tower: nn.Module) -> None:
    for block in tower.encoder.blocks:
        fully_shard(block)
    fully_shard(tower)


def _shard_stage(stage: SslStage) -> None:
    """As the student is."""
    if stage.teacher is not None:
        _shard_tower(stage.teacher)
    for head in stage.heads.values():
        fully_shard(head.student)
        fully_shard(head.teacher)
    if stage.mask_token is not None:
        fully_shard(stage.mask_token)


def _average(parameter: nn.Parameter) -> None:
    # Awaited with the backward's end: this runs first in it, and a wait here would expose the
    # texts' reduce-scatter that is under way.
    work = dist.all_reduce(parameter.grad, async_op=True)

    def finish() -> None:
        work.wait()
        parameter.grad /= dist.get_world_size()

    torch.autograd.Variable._execution_engine.queue_callback(finish)


@contextmanager
def gradient_sync(task: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether gradients of a forward and backward inside cross ranks, or wait for a later one.

    FSDP2's of the stage do not wait: the last pass of a step may be none of theirs.
    """
    if isinstance(task, nn.parallel.DistributedDataParallel) and not enabled:
        with task.no_sync():
            yield
        return
    stage = unwrapped(task).ssl
    apart = set() if stage is None else set(stage.modules())
    for module in task.modules():
        if isinstance(module, FSDPModule) and module not in apart:
            module.set_requires_gradient_sync(enabled, recurse=False)
            module.set_is_last_backward(enabled)
    yield


def unwrapped(task: nn.Module) -> Siglip2Task:
    return task.module if isinstance(task, nn.parallel.DistributedDataParallel) else task


def whole_model(task: nn.Module) -> Siglip2 | None:
    """The model with all its weights, on rank 0; None elsewhere. Every rank must call it."""
    model = unwrapped(task).model
    return _whole(model, lambda: Siglip2(model.architecture, dtype=model.dtype))


def whole_decoder(task: nn.Module) -> Decoder | None:
    """As `whole_model`; None on all ranks where the task has no decoder."""
    locca = unwrapped(task).locca
    if locca is None:
        return None
    return _whole(locca.decoder, lambda: Decoder(locca.decoder.config))


def _whole(module: nn.Module, build: Callable[[], nn.Module]) -> Any:
    parameters = list(module.parameters())
    if not any(hasattr(p, "full_tensor") for p in parameters):
        return module if rank() == 0 else None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    if rank() != 0:
        return None
    copy = build()
    copy.load_state_dict(state)
    return copy.to(parameters[0].device)
