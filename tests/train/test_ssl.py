"""The last fifth of the recipe in a training step: passes, parts, ranks, dropped steps."""

from dataclasses import replace

import pytest
import torch
from train.ssl_case import SSL, B, make_batch, make_config, make_task

from ranks import run
from siglip2.config import OptimConfig
from siglip2.errors import ConfigError, NonFiniteLossError
from siglip2.self_distillation import SslStage, draw_masks, draw_views, take_prepared
from siglip2.train import setup
from siglip2.train.accumulate import accumulate, run_passes
from siglip2.train.optim import adamw
from siglip2.train.parallel import unwrapped, wrap
from siglip2.train.ssl_stage import begin_stage, stage_config, view_seed
from siglip2.train.step import TrainStep


def make_staged(dtype=torch.float64, config=None, **options):
    """A task in its last fifth, whose teacher has fallen behind its student."""
    task = make_task(dtype, **options)
    config = config or make_config()
    begin_stage(task, torch.optim.SGD(task.parameters(), lr=0.1), config)
    generator = torch.Generator().manual_seed(1)
    for teacher in (task.ssl.teacher, *(head.teacher for head in task.ssl.heads.values())):
        for p in [] if teacher is None else teacher.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    task.ssl.to(dtype)
    return task


def gradients(task):
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        atol = 1e-9 * float(x.abs().max())
        torch.testing.assert_close(found[name], x, rtol=1e-6, atol=atol, msg=name)


def test_losses_are_those_of_the_towers_and_of_the_stage():
    """Sigmoid and LocCa on the images as they are, the others on views; every weight learns."""
    task, plain, batch = make_staged(), make_task(), make_batch()
    losses, report = task(batch)
    before, _ = plain(batch)
    for name in ("sigmoid_loss", "locca_loss"):
        torch.testing.assert_close(losses[name], before[name], rtol=1e-7, atol=0)
    prepared = task.prepared(batch)["prepared"]
    alone = task.ssl(task.model.vision, prepared).losses
    for name, value in alone.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-7, atol=0)
    total = sum(value for name, value in losses.items() if name != "loss")
    torch.testing.assert_close(losses["loss"].detach(), total, rtol=1e-7, atol=0)
    assert {"image_teacher_spread", "patch_teacher_spread", "token_accuracy"} <= set(report)
    losses["loss"].backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_branches_and_parts_give_the_gradients_of_one_packed_pass(num_parts):
    whole, other = make_staged(), make_staged(config=make_config(pack="branch"))
    wanted, _ = run_passes(whole, make_batch())
    assert whole.passes == ("all",)
    assert other.passes == ("masked", "local", "original")
    if num_parts == 1:
        found, _ = run_passes(other, make_batch())
    else:
        found, _ = accumulate(other, make_batch(), num_parts)
        packed = make_staged()
        accumulate(packed, make_batch(), num_parts)
        assert_same_gradients(gradients(packed), gradients(whole))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
    assert_same_gradients(gradients(other), gradients(whole))
    for name in ("masked", "distillation"):
        ours, theirs = (getattr(task.ssl, name)._seen for task in (other, whole))
        torch.testing.assert_close(ours, theirs)


def test_a_batch_without_a_seed_is_one_clear_error():
    batch = make_batch()
    del batch["view_seed"]
    with pytest.raises(ValueError, match="need a batch with 'view_seed', the number that views"):
        make_staged()(batch)


def test_views_are_a_function_of_seed_rank_and_step():
    seeds = {view_seed(*numbers) for numbers in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    task = make_staged()
    first, again, other = (
        task.prepared(make_batch() | {"view_seed": seed})["prepared"].views.global_view.patches
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def start(task, config, name):
    optimizer = adamw(task, replace(config.optim, name=name, lr=1e-2))
    step = TrainStep(task, optimizer, on_nonfinite="skip")
    return step


@pytest.mark.parametrize("name", ["adamw", "fused_adamw"])
def test_a_dropped_step_leaves_teacher_and_centres_as_they_were(name):
    config = make_config()
    task = make_task(torch.float32)
    step = start(task, config, name)
    step(make_batch(dtype=torch.float32))
    step.task = begin_stage(step.task, step.optimizer, config)
    step(make_batch(1, dtype=torch.float32))
    before = {key: value.clone() for key, value in task.state_dict().items()}
    bad = make_batch(2, dtype=torch.float32)
    bad["image"] = bad["image"] * float("nan")
    step(bad)
    assert step.num_skipped == 1
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    step(make_batch(3, dtype=torch.float32))
    moved = {key for key, value in task.state_dict().items() if not torch.equal(value, before[key])}
    centres = {"ssl.masked.centre", "ssl.distillation.centre"}
    teachers = {key for key in before if "teacher." in key}
    assert moved >= centres | teachers


def test_a_raised_step_leaves_the_teacher_as_it_was():
    config = make_config()
    task = make_task(torch.float32)
    step = TrainStep(task, adamw(task, config.optim))
    begin_stage(task, step.optimizer, config)
    before = {key: value.clone() for key, value in task.ssl.state_dict().items()}
    bad = make_batch(dtype=torch.float32)
    bad["image"] = bad["image"] * float("inf")
    with pytest.raises(NonFiniteLossError, match="objective sigmoid_loss, locca_loss"):
        step(bad)
    assert all(torch.equal(value, before[key]) for key, value in task.ssl.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "fused_adamw"])
def test_the_teacher_averages_the_new_weights(name):
    config, task = make_config(), make_task(torch.float32)
    step = start(task, config, name)
    begin_stage(task, step.optimizer, config)
    for number in range(3):
        before = [p.clone() for p in task.ssl.pairs(task.model.vision).teacher]
        step(make_batch(number, dtype=torch.float32))
        after, student = task.ssl.pairs(task.model.vision)
        for old, mine, found in zip(before, student, after, strict=True):
            torch.testing.assert_close(found, old.lerp(mine, 0.1))
    assert not torch.equal(task.ssl.teacher.posemb, task.model.vision.posemb)


def test_the_optimiser_keeps_what_it_knew():
    config, task = make_config(), make_task(torch.float32)
    step = start(task, config, "adamw")
    step(make_batch(dtype=torch.float32))
    old = {p: {k: v.clone() for k, v in s.items()} for p, s in step.optimizer.state.items()}
    begin_stage(task, step.optimizer, config)
    for p, state in old.items():
        assert all(torch.equal(step.optimizer.state[p][k], v) for k, v in state.items())
    held = {id(p) for g in step.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in task.parameters() if p.requires_grad}


def draw_for_all(stage, student, images, *, generator, dtype):
    """In place of `SslStage.prepare`: this rank's share of what one process would draw."""
    first, last, whole = draw_for_all.share
    config = stage.config
    views = draw_views(whole, config.views, stage.vision, generator)
    grids = views.global_view.grid_hw.tolist()
    masks = draw_masks(grids, config.mask_share, generator=generator, layout=config.mask_layout)
    from siglip2.self_distillation import Prepared

    mine = take_prepared(Prepared(views, masks, None, None, B, dtype), first, last)
    return stage.ask(student, mine.views, mine.masks, dtype=dtype)


def train_through_the_switch(rank, world, strategy, changes, name="sgd"):
    """Two steps before the stage begins, three with it; this rank's losses and all weights."""
    config = make_config(**changes)
    config = replace(config, dist=replace(config.dist, strategy=strategy))
    SslStage.prepare, original = draw_for_all, SslStage.prepare
    task = wrap(make_task(torch.float32), strategy)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    if name != "sgd":
        optimizer = adamw(task, OptimConfig(name=name, lr=1e-3))
    step, losses = TrainStep(task, optimizer), []
    size = B // world
    first, last = rank * size, (rank + 1) * size
    for number in range(5):
        if number == 2:
            step.task = begin_stage(step.task, optimizer, config)
        draw_for_all.share = first, last, make_batch(number, dtype=torch.float32)["image"]
        losses.append(step(make_batch(number, first, last, torch.float32))["loss"])
    SslStage.prepare = original
    state = unwrapped(step.task).state_dict()
    return torch.stack(losses), {key: whole(value).clone() for key, value in state.items()}


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


RUNS = {
    "ddp": ("ddp", {}),
    "ddp-branch": ("ddp", {"pack": "branch"}),
    "fsdp": ("fsdp", {}),
    "fsdp-branch": ("fsdp", {"pack": "branch"}),
    "fsdp-heads": ("fsdp", {"ema_scope": "heads"}),
    "fsdp-adamw": ("fsdp", {}, "adamw"),
    "fsdp-fused": ("fsdp", {}, "fused_adamw"),
}


def train_all(rank, world):
    return {name: train_through_the_switch(rank, world, *options) for name, options in RUNS.items()}


@pytest.fixture(scope="module")
def two_processes():
    return run(2, train_all)


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_go_through_the_switch_like_one(name, two_processes):
    losses, state = train_through_the_switch(0, 1, *RUNS[name])
    shares = [found[name] for found in two_processes]
    torch.testing.assert_close(sum(x for x, _ in shares) / 2, losses)
    for _, found in shares:
        assert found.keys() == state.keys()
        # Adam makes a whole step of a gradient that is rounding alone, as a key's bias has.
        for key, value in state.items() if len(RUNS[name]) == 2 else ():
            torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_share": 1.5}, "ssl.start_share: need 0 to 1; got 1.5"),
        ({"prototypes": 0}, "ssl.prototypes: need more than 0; got 0"),
        ({"masked_weight": -1.0}, "ssl.masked_weight: need 0 or more; got -1.0"),
        ({"size_factor": 0.0}, "ssl.size_factor: need more than 0; got 0.0"),
        ({"num_local": 0}, "ssl.num_local: need 1 or more with ssl.distillation_weight; got 0"),
    ],
)
def test_settings_that_cannot_work_are_one_line(change, message):
    with pytest.raises(ConfigError) as error:
        setup.check(make_config(**change))
    assert message in str(error.value)


def test_views_of_a_run_are_crops_alone_where_it_says_so():
    views, plain = (
        stage_config(replace(SSL, photometric=wanted)).views for wanted in (True, False)
    )
    assert views.jitter > 0
    assert plain == views.crops_alone()
    assert plain.num_local == SSL.num_local
