"""torchrun's ranks.

Process group, DDP or FSDP2 around the task, and full weights back from either.
"""

import os
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..models.siglip2 import Siglip2
from .task import Siglip2Task

Parallel = Literal["ddp", "fsdp2"]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def init_distributed() -> torch.device:
    """Join the process group if torchrun started this process; pick this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def wrap(task: Siglip2Task, parallel: Parallel) -> nn.Module:
    """The task, averaging gradients over ranks; itself when there is one rank."""
    if world_size() == 1:
        return task
    if parallel == "ddp":
        devices = [task.model.device] if task.model.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(task, device_ids=devices)
    return _fsdp2(task)


def _fsdp2(task: Siglip2Task) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = task.model
    # FSDP2 cannot shard 0-D parameters: the two scalars stay whole and average their gradients
    # here.
    scalars = {model.log_scale, model.bias}
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_average)
    for tower in (model.vision, model.text):
        for block in tower.encoder.blocks:
            fully_shard(block)
    fully_shard(task, ignored_params=scalars)
    return task


def _average(parameter: nn.Parameter) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def unwrapped(task: nn.Module) -> Siglip2Task:
    return task.module if isinstance(task, nn.parallel.DistributedDataParallel) else task


def whole_model(task: nn.Module) -> Siglip2 | None:
    """The model with all its weights, on rank 0; None elsewhere. Every rank must call it."""
    model = unwrapped(task).model
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model if rank() == 0 else None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank() != 0:
        return None
    copy = Siglip2(model.architecture, dtype=model.dtype)
    copy.load_state_dict(state)
    return copy.to(model.device)
