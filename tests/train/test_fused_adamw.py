"""The optimiser: torch's state both ways, teachers, shards, and its place in a training step."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from compare import assert_no_worse
from ranks import run
from siglip2.config import OptimConfig
from siglip2.errors import NonFiniteLossError
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.checkpoint import Progress, checkpoints, load, save
from siglip2.train.fused_adamw import FusedAdamW
from siglip2.train.optim import adamw
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task

RUNNERS = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param("triton", "cpu", id="triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]
RULES = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
MOMENTUM = 0.9


def make_model(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 40), nn.GELU(), nn.Linear(40, 5)).to(device)


def groups(model):
    """Two groups that decay apart."""
    weights = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [{"params": weights, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]


def fill(model, number):
    g = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.device, p.dtype)


def train(model, optimizer, numbers):
    for number in numbers:
        fill(model, number)
        optimizer.step()


def bits(optimizer):
    state = optimizer.state_dict()["state"]
    return {(i, name): x.cpu().clone() for i, entry in state.items() for name, x in entry.items()}


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_groups_decay_as_they_say(backend, device):
    """Twenty steps against float64, erring no more than torch's own loop in float32."""
    actual, eager, gold = make_model(device), make_model(), make_model().double()
    optimizers = [
        FusedAdamW(groups(actual), **RULES, backend=backend),
        torch.optim.AdamW(groups(eager), **RULES, foreach=False),
        torch.optim.AdamW(groups(gold), **RULES, foreach=False),
    ]
    for model, optimizer in zip((actual, eager, gold), optimizers, strict=True):
        train(model, optimizer, range(20))
    for a, e, g in zip(*(m.parameters() for m in (actual, eager, gold)), strict=True):
        assert_no_worse("p", a, e, g, torch.float32)


@pytest.mark.parametrize("fused", [True, False], ids=["from-fused", "from-a-loop"])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_a_run_switches_to_it_and_back(backend, device, fused):
    """Each hands its state to the other bit for bit, and the other goes on from it."""
    model, twin = make_model(device), make_model(device)
    theirs = torch.optim.AdamW(groups(model), **RULES, fused=fused)
    train(model, theirs, range(3))
    ours = FusedAdamW(groups(model), lr=5.0, backend=backend)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert bits(ours).keys() == bits(theirs).keys()
    assert all(torch.equal(x, bits(theirs)[key]) for key, x in bits(ours).items())
    assert [g["lr"] for g in ours.param_groups] == [RULES["lr"]] * 2
    train(model, ours, range(3, 6))
    back = torch.optim.AdamW(groups(model), lr=5.0, fused=fused)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert all(torch.equal(x, bits(ours)[key]) for key, x in bits(back).items())
    train(model, back, range(6, 9))

    alone = torch.optim.AdamW(groups(twin), **RULES, fused=fused)
    train(twin, alone, range(9))
    gold = make_model().double()
    train(gold, torch.optim.AdamW(groups(gold), **RULES, foreach=False), range(9))
    for a, e, g in zip(*(m.parameters() for m in (model, twin, gold)), strict=True):
        assert_no_worse("p", a, e, g, torch.float32)
    assert {float(s["step"]) for s in back.state.values()} == {9.0}


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_teachers_follow_the_new_weights(backend, device):
    model, gold = make_model(device), make_model().double()
    optimizer = FusedAdamW(groups(model), **RULES, backend=backend)
    optimizer.momentum = torch.tensor(MOMENTUM, dtype=torch.float64, device=device)
    teachers = [p.detach().clone() for p in model.parameters()]
    half = torch.float16 if (backend, device) == ("triton", "cpu") else torch.bfloat16
    copies = [torch.empty_like(p, dtype=half) for p in model.parameters()]
    for p, teacher, c in zip(model.parameters(), teachers, copies, strict=True):
        optimizer.attach(p, teacher=teacher, copy=c, teacher_copy=c.clone())
        assert torch.equal(c, p.to(half))
    theirs = torch.optim.AdamW(groups(gold), **RULES, foreach=False)
    averages = [p.detach().clone() for p in gold.parameters()]
    eager = [p.detach().float() for p in gold.parameters()]
    for i in range(20):
        momentum = 1 - 0.1 / (i + 1)  # a schedule
        optimizer.momentum.fill_(momentum)
        train(model, optimizer, [i])
        train(gold, theirs, [i])
        torch._foreach_lerp_(averages, list(gold.parameters()), 1 - momentum)
        torch._foreach_lerp_(eager, [p.float() for p in gold.parameters()], 1 - momentum)
    for a, e, g in zip(teachers, eager, averages, strict=True):
        assert_no_worse("teacher", a, e, g.detach(), torch.float32)
    assert all(torch.equal(c, p.to(half)) for c, p in zip(copies, model.parameters(), strict=True))
    assert "momentum" not in optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_teachers_follow_where_there_is_no_gradient_and_stay_where_inf_was_found(backend, device):
    model = make_model(device)
    optimizer = FusedAdamW(model.parameters(), **RULES, backend=backend)
    optimizer.momentum = MOMENTUM
    first, *rest = model.parameters()
    teacher = torch.zeros_like(first)
    optimizer.attach(first, teacher=teacher)
    other = torch.zeros_like(rest[0])
    optimizer.attach(rest[0], teacher=other)
    fill(model, 0)
    first.grad = None
    before = first.detach().clone()
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert not teacher.any()
    assert not other.any()
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert torch.equal(first, before)
    torch.testing.assert_close(teacher, (1 - MOMENTUM) * before)
    torch.testing.assert_close(other, (1 - MOMENTUM) * rest[0].detach())


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_clips_in_the_same_pass_and_only_once(backend, device):
    ours, theirs = make_model(device), make_model(device)
    optimizer = FusedAdamW(ours.parameters(), **RULES, backend=backend)
    plain = torch.optim.AdamW(theirs.parameters(), **RULES)
    for i, clipped in enumerate([True, False]):
        fill(ours, i)
        fill(theirs, i)
        if clipped:
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            optimizer.clip_coefficient = 0.5 / (norm + 1e-6)
        optimizer.step()
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(optimizer.state.values(), plain.state.values(), strict=True):
        torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"])


OPTIM = OptimConfig(lr=1e-3)


def make_task():
    torch.manual_seed(0)
    model = Siglip2(architecture("siglip2-tiny-patch8-32", text_length=8))
    model.init_weights()
    return Siglip2Task(model)


def make_batch(number=0):
    g = torch.Generator().manual_seed(number)
    image = torch.rand(6, 3, 32, 32, generator=g) * 2 - 1
    return {"image": image, "text": torch.randint(5, 500, (6, 8), generator=g)}


def test_trains_as_torch_does():
    tasks = make_task(), make_task()
    steps = [
        TrainStep(task, adamw(task, replace(OPTIM, name=name)), grad_clip_norm=0.1)
        for task, name in zip(tasks, ("fused_adamw", "adamw"), strict=True)
    ]
    for i in range(3):
        ours, theirs = (step(make_batch(i), examples=6 * i) for step in steps)
        torch.testing.assert_close(ours["loss"], theirs["loss"])
        torch.testing.assert_close(ours["grad_norm"], theirs["grad_norm"])
    assert float(ours["grad_norm"]) > 0.1
    second = [s.optimizer.state[s.task.model.vision.posemb]["exp_avg_sq"] for s in steps]
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-12)


def test_a_non_finite_step_keeps_weights_state_and_teacher():
    task = make_task()
    optimizer = adamw(task, replace(OPTIM, name="fused_adamw"))
    optimizer.momentum = MOMENTUM
    table = task.model.vision.posemb
    teacher = table.detach() + 1
    optimizer.attach(table, teacher=teacher)
    step = TrainStep(task, optimizer)
    step(make_batch())
    before = [x.clone() for x in (table.detach(), teacher, *optimizer.state[table].values())]
    batch = make_batch()
    batch["image"][2] = torch.nan
    with pytest.raises(NonFiniteLossError, match="step 1: objective sigmoid_loss is not finite"):
        step(batch)
    after = (table.detach(), teacher, *optimizer.state[table].values())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("names", [("adamw", "fused_adamw"), ("fused_adamw", "adamw")])
def test_checkpoints_load_into_the_other_and_leave_teachers_alone(tmp_path, names):
    task, resumed = make_task(), make_task()
    first = adamw(task, replace(OPTIM, name=names[0]))
    TrainStep(task, first)(make_batch())
    save(tmp_path, task, first, Progress(1, 6, {}, 0.0), keep=1)
    second = adamw(resumed, replace(OPTIM, name=names[1]))
    table = resumed.model.vision.posemb
    teacher = torch.zeros_like(table)
    if names[1] == "fused_adamw":
        second.momentum = MOMENTUM
        second.attach(table, teacher=teacher)
    load(checkpoints(tmp_path)[-1], resumed, second)
    assert not teacher.any()
    assert all(torch.equal(x, bits(first)[key]) for key, x in bits(second).items())
    for name, p in resumed.named_parameters():
        assert torch.equal(p, task.get_parameter(name))


def test_a_copy_of_it_steps_alike():
    model = make_model()
    optimizer = FusedAdamW(model.parameters(), **RULES)
    train(model, optimizer, [0])
    twin = copy.deepcopy(optimizer)
    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"],
                    strict=True):  # fmt: skip
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    twin.step()
    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"],
                    strict=True):  # fmt: skip
        assert torch.equal(p, q)


def shard_share(rank, world, backend):
    """Full weights, teacher and second moments after three steps; sharded where ranks are two."""
    model = make_model()
    teacher = make_model()
    if world > 1:
        for m in (model, teacher):
            fully_shard(m[0])
            fully_shard(m)
    optimizer = FusedAdamW(groups(model), **RULES, backend=backend)
    optimizer.momentum = MOMENTUM
    copies = {}
    for p, t in zip(model.parameters(), teacher.parameters(), strict=True):
        copies[p] = torch.empty_like(p, dtype=torch.float16)
        optimizer.attach(p, teacher=t.detach(), copy=copies[p])
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        model(torch.randn(6, 7, generator=g)).square().sum().backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.clip_coefficient = (1 / norm).clamp(max=1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    with torch.no_grad():
        lists = [*model.parameters()], [*teacher.parameters()], [*copies.values()]
        lists += ([optimizer.state[p]["exp_avg_sq"] for p in model.parameters()],)
        return [whole(x).clone() for xs in lists for x in xs]


@pytest.mark.dist
@pytest.mark.parametrize(("backend", "device"), RUNNERS[:2])
def test_two_ranks_of_fsdp_step_as_one_process(backend, device):
    """Widths of 7, 40 and 5 rows over two ranks: uneven shards that begin anywhere."""
    alone = shard_share(0, 1, backend)
    for share in run(2, shard_share, backend):
        for a, b in zip(share, alone, strict=True):
            torch.testing.assert_close(a, b)


def test_says_what_it_needs():
    model = make_model()
    with pytest.raises(ValueError, match="need amsgrad=False: FusedAdamW has no such form"):
        FusedAdamW([{"params": model.parameters(), "amsgrad": True}])
    optimizer = FusedAdamW(model.parameters())
    with pytest.raises(ValueError, match=r"need a parameter of this optimizer; got .* \(3,\)"):
        optimizer.attach(torch.zeros(3))
    p = next(model.parameters())
    with pytest.raises(ValueError, match="need a teacher with teacher_copy; got None"):
        optimizer.attach(p, teacher_copy=torch.zeros_like(p))
    optimizer.attach(p, teacher=torch.zeros_like(p))
    fill(model, 0)
    with pytest.raises(ValueError, match="need momentum with teachers; got None"):
        optimizer.step()
    saved = torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="need amsgrad=False"):
        optimizer.load_state_dict(saved)
