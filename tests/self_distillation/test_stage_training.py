"""The stage over steps: teacher, centres, checkpoints, and what is off."""

from dataclasses import replace

import pytest
import torch
from self_distillation.stage_case import (
    HEAD,
    VISION,
    config,
    generator,
    images,
    make,
    part,
    prepare,
    trained,
)

from siglip2.config import OptimConfig
from siglip2.models.vision import VisionTower
from siglip2.self_distillation import SslConfig, SslStage, ViewConfig, cosine_momentum
from siglip2.train.checkpoint import Progress, checkpoints, load, save
from siglip2.train.optim import adamw


def steps(tower, stage, num, first=0, optimizer=None):
    values = []
    optimizer = optimizer or torch.optim.SGD(trained(tower, stage).values(), lr=0.05)
    for number in range(first, first + num):
        prepared = stage.prepare(
            tower, images(seed=number, dtype=torch.float32), generator=generator(number)
        )
        loss = sum(stage(tower, prepared).losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stage.update_teacher(tower, 4 * (number + 1))
        values.append(loss.detach())
    return torch.stack(values)


def test_two_runs_are_bit_equal():
    found = []
    for _ in range(2):
        tower, stage = make(torch.float32)
        found.append((steps(tower, stage, 3), tower.state_dict(), stage.state_dict()))
    (losses, *states), (again, *others) = found
    assert torch.equal(losses, again)
    for state, other in zip(states, others, strict=True):
        assert all(torch.equal(x, other[name]) for name, x in state.items())


def test_teacher_follows_float64_arithmetic_in_training():
    tower, stage = make(torch.float32, momentum=cosine_momentum(0.5, 1.0, start=0, end=80))
    pairs = stage.pairs(tower)
    wanted = [p.double() for p in pairs.teacher]
    for number in range(20):
        steps(tower, stage, 1, first=number)
        m = cosine_momentum(0.5, 1.0, start=0, end=80)(4 * (number + 1))
        wanted = [m * w + (1 - m) * s.double() for w, s in zip(wanted, pairs.student, strict=True)]
    for found, gold in zip(pairs.teacher, wanted, strict=True):
        size = max(1.0, float(gold.abs().max()))
        assert (found.double() - gold).abs().max() <= 20 * torch.finfo(torch.float32).eps * size


def test_a_checkpoint_brings_everything_back(tmp_path):
    """Training goes on as if it had not stopped, to the bit; `begin` leaves the teacher alone."""
    tower, stage = make(torch.float32)
    model = torch.nn.ModuleDict({"vision": tower, "ssl": stage})
    optimizer = adamw(model, OptimConfig())
    steps(tower, stage, 2, optimizer=optimizer)
    save(tmp_path, model, optimizer, Progress(2, 8, {}, 0.0), keep=1)
    wanted = steps(tower, stage, 2, first=2, optimizer=optimizer)

    torch.manual_seed(7)
    fresh = VisionTower(VISION)
    fresh.init_weights()
    again = SslStage(config(), VISION)
    model = torch.nn.ModuleDict({"vision": fresh, "ssl": again})
    optimizer = adamw(model, OptimConfig())
    load(checkpoints(tmp_path)[-1], model, optimizer)
    before = again.teacher.posemb.clone()
    again.begin(fresh)
    assert torch.equal(again.teacher.posemb, before)
    assert not torch.equal(again.teacher.posemb, fresh.posemb)
    assert torch.equal(steps(fresh, again, 2, first=2, optimizer=optimizer), wanted)


def test_the_teacher_starts_as_the_student_and_the_optimiser_never_sees_it():
    torch.manual_seed(0)
    tower = VisionTower(VISION)
    tower.init_weights()
    stage = SslStage(config(), VISION)
    with pytest.raises(ValueError, match=r"call stage.begin\(tower\) first"):
        stage.prepare(tower, images(), generator=generator())
    stage.begin(tower)
    for found, wanted in zip(*stage.pairs(tower), strict=True):
        assert torch.equal(found, wanted)
    groups = adamw(stage, OptimConfig()).param_groups
    seen = {id(p) for group in groups for p in group["params"]}
    wanted = {id(p) for head in stage.heads.values() for p in head.student.parameters()}
    assert seen == wanted | {id(stage.mask_token.weight)}
    assert stage.teacher.posemb.dtype is torch.float32
    assert not stage.teacher.posemb.requires_grad


def test_views_are_drawn_where_the_tower_is():
    tower, stage = make()
    with pytest.raises(ValueError, match="generator of the tower's device, meta; got one of cpu"):
        stage.prepare(tower.to("meta"), images(), generator=generator())


def test_what_is_off_is_not_built():
    both = {name for name, _ in SslStage(config(), VISION).named_children()}
    assert both == {"heads", "distillation", "masked", "mask_token", "teacher"}
    image = SslStage(config(masked_weight=0.0), VISION)
    assert (list(image.heads), image.masked, image.mask_token) == (["image"], None, None)
    assert image.branches == ("all",)
    patch = SslStage(config(distillation_weight=0.0, ema_scope="heads", pack="branch"), VISION)
    assert (list(patch.heads), patch.distillation, patch.teacher) == (["patch"], None, None)
    assert patch.branches == ("masked",)
    assert list(SslStage(config(shared_head=True), VISION).heads) == ["shared"]
    with pytest.raises(ValueError, match="need a distillation_weight or masked_weight above 0"):
        SslStage(config(distillation_weight=0.0, masked_weight=0.0), VISION)


@pytest.mark.parametrize(
    ("off", "left"),
    [("masked_weight", "distillation_loss"), ("distillation_weight", "masked_loss")],
)
def test_one_loss_alone_has_no_unused_parameters(off, left):
    tower, stage = make(**{off: 0.0})
    prepared = prepare(tower, stage)
    losses, report, _ = stage(tower, prepared)
    assert list(losses) == [left]
    both = make()
    assert losses[left].isfinite()
    losses[left].backward()
    assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)
    assert len(report) == 1
    assert len(list(stage.parameters())) < len(list(both[1].parameters()))


def test_spread_tells_a_collapsed_teacher():
    tower, stage = make()
    report = stage(tower, prepare(tower, stage)).report
    assert 0 < report["image_teacher_spread"] < 1
    one = images(1).expand(4, -1, -1, -1)
    plain = ViewConfig(num_local=1, global_area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, jitter=0.0,
                       grayscale=0.0, global_blur=0.0, solarize=0.0)  # fmt: skip
    stage.config = replace(stage.config, views=plain)
    report = stage(tower, prepare(tower, stage, one)).report
    assert report["image_teacher_spread"].item() == pytest.approx(0, abs=1e-6)


def test_published_numbers():
    published = SslConfig()
    assert published.begins_at(1000) == 800
    factors = [published.factor(width) for width in (768, 1024, 1152, 1536, 128)]
    assert factors == [0.25, 0.5, 1.0, 0.5, 0.25]
    stage = SslStage(SslConfig(head=HEAD), VISION)
    assert (stage.distillation_weight, stage.masked_weight) == (0.25, 0.0625)
    assert stage.momentum(10**10) == 0.966


def test_a_skipped_step_leaves_no_trace_in_the_centres():
    tower, stage = make()
    before = stage.masked.centre.clone()
    prepare(tower, stage)
    stage.skip_update()
    stage.finish_update()
    assert torch.equal(stage.masked.centre, before)
    prepare(tower, stage)
    stage.finish_update()
    assert not torch.equal(stage.masked.centre, before)


def test_parts_of_a_batch_move_the_centre_like_the_whole():
    (tower, stage), (_, other) = make(), make()
    prepared = prepare(tower, stage)
    stage.finish_update()
    for first, last in ((0, 1), (1, 4)):
        mine = part(prepared.views, prepared.masks, first, last)
        other.ask(tower, *mine, dtype=torch.float64)
    other.finish_update()
    for name in ("masked", "distillation"):
        found, wanted = getattr(other, name).centre, getattr(stage, name).centre
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
