"""Whole runs through the switch: resumed before, at and after it, with parts and by branches."""

import json
from dataclasses import replace

import pytest
import torch
from train.ssl_case import SSL

from siglip2.config import QuickstartConfig
from siglip2.recipe.presets import preset
from siglip2.train.checkpoint import checkpoints, read_progress
from siglip2.train.parallel import unwrapped
from siglip2.train.ssl_stage import CollapseNotice
from siglip2.train.trainer import Run, loop, train

STEPS, SWITCH = 8, 4  # the stage begins after so many


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def make_config(folder, cache, *, changes=None, **train_changes):
    start = preset("quickstart")
    settings = {
        "output_dir": str(folder),
        "examples": 8 * STEPS,
        "batch_size": 8,
        "log_every_steps": 1,
        "checkpoint_every_steps": 100,
    }
    ssl = replace(SSL, **{"start_share": SWITCH / STEPS, **(changes or {})})
    return replace(
        start,
        model=replace(start.model, name="siglip2-tiny-patch8-32", text_length=8),
        data=replace(
            start.data, val=None, quickstart=QuickstartConfig(concepts=24, cache_dir=cache)
        ),
        ssl=ssl,
        optim=replace(start.optim, warmup_examples=16),
        train=replace(start.train, **settings | train_changes),
    )


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("perf/", "time_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


def state_of(run):
    task, optimizer = unwrapped(run.task), run.step.optimizer
    named = {p: name for name, p in task.named_parameters()}
    moments = {
        f"{named[p]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    return {**task.state_dict(), **moments}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = Run(make_config(folder, cache))
    assert unwrapped(run.task).ssl is None
    loop(run)
    return run


def test_the_stage_begins_in_the_middle(whole):
    with_stage = [row["step"] for row in rows(whole.dir) if "train/masked_loss" in row]
    assert with_stage == list(range(SWITCH + 1, STEPS + 1))
    last = rows(whole.dir)[-1]
    assert {"train/distillation_loss", "train/image_teacher_spread"} <= set(last)
    named = unwrapped(whole.task).ssl.named_parameters()
    assert all(name.split(".")[-2:] != ["teacher", "posemb"] or p.grad is None for name, p in named)


@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 2])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, cache, whole, stop):
    """Stopped before the switch, at it, after the first step with the stage, and later."""
    folder = tmp_path / "run"
    first = Run(make_config(folder, cache))
    first.num_steps = stop
    loop(first)
    first.save()
    (saved,) = checkpoints(folder / "checkpoints")
    assert read_progress(saved).has_stage == (stop > SWITCH)
    torch.manual_seed(123)  # what else drew numbers in the meantime plays no part
    resumed = Run(make_config(folder, cache))
    assert (unwrapped(resumed.task).ssl is not None) == (stop > SWITCH)
    loop(resumed)
    assert rows(folder) == rows(whole.dir)
    found, wanted = state_of(resumed), state_of(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_parts_branches_and_the_other_optimiser_take_over(tmp_path, cache, whole):
    """What a resumed run may change computes the same."""
    folder = tmp_path / "run"
    first = Run(make_config(folder, cache))
    first.num_steps = SWITCH + 1
    loop(first)
    first.save()
    config = make_config(folder, cache, changes={"pack": "branch"}, accum_steps=2)
    loop(Run(replace(config, optim=replace(config.optim, name="fused_adamw"))))
    for found, wanted in zip(rows(folder), rows(whole.dir), strict=True):
        assert found.keys() == wanted.keys()
        losses = {name: value for name, value in wanted.items() if name.endswith("loss")}
        assert {name: found[name] for name in losses} == pytest.approx(losses, rel=1e-3)


def test_a_collapsed_teacher_is_told_once(tmp_path, cache, capsys, monkeypatch):
    notice = CollapseNotice()
    row = {"train/image_teacher_spread": 0.019, "train/patch_teacher_spread": 0.9}
    (line,) = notice(row)
    assert "image-level teacher" in line
    assert "spread 0.019" in line
    assert notice(row) == []
    assert notice({"train/loss": 1.0}) == []
    (line,) = notice({**row, "train/patch_teacher_spread": 0.0})
    assert "patch-level" in line
    monkeypatch.setattr("siglip2.train.ssl_stage.COLLAPSED", 1.0)
    run = Run(make_config(tmp_path, cache))
    run.num_steps = SWITCH + 2
    loop(run)
    assert capsys.readouterr().out.count("gives nearly one answer to all") == 2


def test_parts_of_one_image_are_no_collapse(tmp_path, cache, capsys):
    run = Run(make_config(tmp_path, cache, accum_steps=8))
    run.num_steps = SWITCH + 1
    loop(run)
    last = rows(tmp_path)[-1]
    assert "train/distillation_loss" in last
    assert "train/image_teacher_spread" not in last
    assert last["train/patch_teacher_spread"] > 0
    assert "nearly one answer" not in capsys.readouterr().out


def test_one_loss_alone_builds_the_other_s_nothing(tmp_path, cache):
    config = make_config(tmp_path, cache, changes={"masked_weight": 0.0, "start_share": 0.0})
    run = Run(config)
    run.num_steps = 2
    loop(run)
    stage = unwrapped(run.task).ssl
    assert (stage.masked, stage.mask_token, list(stage.heads)) == (None, None, ["image"])
    assert "train/masked_loss" not in rows(tmp_path)[-1]


def test_without_weights_nothing_is_built(tmp_path, cache):
    config = make_config(
        tmp_path, cache, changes={"masked_weight": 0.0, "distillation_weight": 0.0}
    )
    run = Run(config)
    loop(run)
    assert unwrapped(run.task).ssl is None
    assert "train/masked_loss" not in rows(tmp_path)[-1]


def test_naflex_images_go_through_the_stage(tmp_path, cache):
    """Packed bytes of any grid beside square views in one pass."""
    start = make_config(tmp_path, cache, changes={"start_share": 0.0})
    model = replace(start.model, name="siglip2-tiny-patch8-naflex")
    data = replace(start.data, max_num_patches=16, canvas_aspect=2.0, random_shift=0.0)
    run = Run(replace(start, model=model, data=data))
    run.num_steps = 2
    loop(run)
    assert rows(tmp_path)[-1]["train/masked_loss"] > 0


def test_the_preset_is_evaluated_densely_and_reported(tmp_path, cache):
    """The quick start's scenes, model and settings; a few of its steps."""
    start = preset("ssl-quickstart")
    batch = start.train.batch_size
    folder = tmp_path / "run"
    config = replace(
        start,
        data=replace(start.data, quickstart=QuickstartConfig(concepts=60, cache_dir=cache)),
        train=replace(start.train, output_dir=str(folder), examples=4 * batch, log_every_steps=1),
        optim=replace(start.optim, warmup_examples=2 * batch),
        ssl=replace(start.ssl, start_share=0.5),
        eval=replace(start.eval, max_images=16),
    )
    train(config)
    with_stage = [row["step"] for row in rows(folder) if "train/masked_loss" in row]
    assert with_stage == [3, 4]
    found = json.loads((folder / "eval.json").read_text())
    dense = found["dense"]["held_out"]
    assert 0 <= dense["miou"] <= 1
    assert 0 < dense["background_miou"] < 1
    assert found["metrics"]["val/held_out/dense/miou"] == dense["miou"]
    page = (folder / "report.html").read_text()
    assert "Dense features" in page
    assert "Self-distillation" in page
