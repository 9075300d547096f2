"""Ranks equal one process: losses, gradients, centres, Sinkhorn, teacher; plain, DDP and FSDP2."""

import pytest
import torch
import torch.distributed as dist
from self_distillation.stage_case import images, make, part, prepare, trained
from torch import nn
from torch.distributed.fsdp import fully_shard

from ranks import run

EPS = torch.finfo(torch.float64).eps
NUM_STEPS = 3
SIZES = {"two": (2, 2), "two-uneven": (3, 1), "four": (1, 1, 1, 1), "four-uneven": (0, 2, 1, 1)}


def drawn(stage, tower, number=0):
    """Views and masks of the whole batch, the same on every rank."""
    prepared = prepare(tower, stage, images(seed=number), seed=number)
    stage.skip_update()
    return prepared.views, prepared.masks


def share_of_steps(rank, world, sizes):
    return {balance: share_of_step(rank, sizes, balance) for balance in ("centring", "sinkhorn")}


def share_of_step(rank, sizes, balance):
    """One step of this rank: losses, averaged gradients, centres and teacher after it."""
    tower, stage = make(balance=balance)
    # In one process: collectives inside would mix the ranks' whole batches.
    views, masks = alone(drawn, stage, tower)
    first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
    prepared = stage.ask(tower, *part(views, masks, first, last), dtype=torch.float64)
    losses = stage(tower, prepared).losses
    named = trained(tower, stage)
    grads = torch.autograd.grad(sum(losses.values()), named.values())
    for value in (*losses.values(), *grads):
        average(value)
    with torch.no_grad():
        for parameter, grad in zip(named.values(), grads, strict=True):
            parameter -= 0.1 * grad
    stage.update_teacher(tower, 4)
    found = {name: value.detach() for name, value in losses.items()}
    found |= dict(zip((f"gradient of {name}" for name in named), grads, strict=True))
    found |= {f"after: {name}": value for name, value in stage.state_dict().items()}
    return {name: value.clone() for name, value in found.items()}


def alone(fn, *args):
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        return fn(*args)
    finally:
        dist.is_initialized = initialized


def average(x):
    if dist.is_initialized():
        with torch.no_grad():
            dist.all_reduce(x)
            x /= dist.get_world_size()


def assert_close(found, wanted, places=14):
    assert found.keys() == wanted.keys()
    for name, gold in wanted.items():
        error = (found[name].double() - gold.double()).abs().max()
        assert error <= 2**places * EPS * gold.double().abs().max(), name


@pytest.mark.dist
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ranks_equal_one_process(sizes):
    wanted = share_of_steps(0, 1, (4,))
    for found in run(len(sizes), share_of_steps, sizes):
        for balance, gold in wanted.items():
            assert_close(found[balance], gold)


class Task(nn.Module):
    """What a trainer wraps: the losses in its forward."""

    def __init__(self, tower, stage):
        super().__init__()
        self.vision, self.ssl = tower, stage

    def forward(self, views, masks):
        prepared = self.ssl.ask(self.vision, views, masks, dtype=torch.float64)
        return sum(self.ssl(self.vision, prepared).losses.values())


def sharded(task):
    for tower in (task.vision, task.ssl.teacher):
        if tower is not None:
            for block in tower.encoder.blocks:
                fully_shard(block)
            fully_shard(tower)
    for head in task.ssl.heads.values():
        fully_shard(head.student)
        fully_shard(head.teacher)
    fully_shard(task.ssl.mask_token)
    return task


def train(rank, world, strategy, options):
    tower, stage = make(**options)
    batches = [alone(drawn, stage, tower, number) for number in range(NUM_STEPS)]
    task = Task(tower, stage)
    wrapped = task
    if strategy == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(task)
    elif strategy == "fsdp":
        sharded(task)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    size, losses = 4 // world, []
    for number, batch in enumerate(batches):
        loss = wrapped(*part(*batch, rank * size, (rank + 1) * size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stage.update_teacher(tower, 4 * number)
        losses.append(loss.detach())
    state = {name: whole(value) for name, value in task.state_dict().items()}
    return torch.stack(losses), state


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


@pytest.mark.dist
@pytest.mark.parametrize("options", [{}, {"ema_scope": "heads"}], ids=["full", "heads"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_teacher_and_student_like_one(strategy, options):
    losses, state = train(0, 1, "none", options)
    shares = run(2, train, strategy, options)
    mean = sum(x for x, _ in shares) / 2
    for _, found in shares:
        assert_close({**found, "losses": mean}, {**state, "losses": losses}, places=20)
    moved = [name for name in state if name.startswith("ssl.heads.image.teacher")]
    _, fresh = make(**options)
    start = {f"ssl.{name}": value for name, value in fresh.state_dict().items()}
    assert all(not torch.equal(state[name], start[name]) for name in moved)
