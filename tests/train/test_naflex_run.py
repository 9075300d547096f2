"""Whole NaFlex runs on the default data: budgets, parts, ranks, resuming, the table at the end."""

import json
from dataclasses import replace

import pytest
import torch

from ranks import run
from siglip2.config import QuickstartConfig
from siglip2.errors import ConfigError
from siglip2.recipe.presets import preset
from siglip2.train import setup
from siglip2.train.trainer import Run, loop, train

STEPS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def make_config(folder, cache, *, batch_size=16, steps=STEPS, **data):
    start = preset("naflex-quickstart")
    return replace(
        start,
        model=replace(start.model, name="siglip2-tiny-patch8-naflex", text_length=8),
        data=replace(start.data, quickstart=QuickstartConfig(concepts=24, cache_dir=cache), **data),
        train=replace(
            start.train,
            output_dir=str(folder),
            examples=16 * steps,
            batch_size=batch_size,
            log_every_steps=1,
            checkpoint_every_steps=3,
        ),
        optim=replace(start.optim, warmup_examples=32),
        eval=replace(start.eval, budgets=(9, 16), max_images=48),
    )


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "train/loss" in row]


def test_the_preset_s_run_ends_with_a_table_of_budgets(tmp_path, cache, capsys):
    train(make_config(tmp_path, cache))
    logged = rows(tmp_path)
    assert len(logged) == STEPS
    assert len({row["data/tokens"] for row in logged}) > 1
    assert all(0.7 < row["data/fill"] <= 1 and row["data/balance"] == 1 for row in logged)
    printed = capsys.readouterr().out
    assert "fill" in printed
    table = printed.split("At each number of patches an image may have:")[1].splitlines()
    assert [line.split()[:2] for line in table[2:4]] == [["9", "no"]] * 2
    budgets = json.loads((tmp_path / "eval.json").read_text())["budgets"]
    assert {(row["budget"], row["seen"]) for row in budgets} == {(9, False), (16, True)}
    assert "Resolutions" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("mode", ["batch", "mixed"])
def test_parts_change_no_loss(tmp_path, cache, mode):
    """max_tokens bounds memory: equal batches go in parts, mixed ones get smaller images."""
    losses = []
    for name, max_tokens in (("whole", None), ("bounded", 16 * 16)):
        config = make_config(
            tmp_path / name, cache, budget_mode=mode, max_tokens=max_tokens, val=None
        )
        loop(Run(config))
        losses.append([row["train/loss"] for row in rows(tmp_path / name)])
        if mode == "mixed" and max_tokens:
            assert all(row["data/tokens"] <= max_tokens for row in rows(tmp_path / name))
    if mode == "batch":
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def losses_of_rank(rank, world, folder, cache):
    config = make_config(folder, cache, batch_size=8, budget_mode="mixed", val=None, max_tokens=400)
    started = Run(config)
    loop(started)
    return [p.detach().clone() for p in started.model.parameters()]


@pytest.mark.dist
def test_mixed_ranks_stay_in_step(tmp_path, cache):
    """Ranks with other numbers of patches: equal counts of images, one model."""
    first, second = run(2, losses_of_rank, str(tmp_path / "run"), cache)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    logged = rows(tmp_path / "run")
    assert len(logged) == STEPS
    assert any(row["data/balance"] > 1 for row in logged)
    assert all(row["data/balance"] < 1.5 for row in logged)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_budgets": (16, 0)}, "data.patch_budgets, eval.budgets: need 1 or more"),
        ({"canvas_aspect": 0.5}, "data.canvas_aspect: need 1 or more; got 0.5"),
        ({"patch_budgets": (), "max_tokens": 9}, "data.max_tokens: needs data.patch_budgets"),
    ],
)
def test_faults_are_named(tmp_path, cache, changes, said):
    with pytest.raises(ConfigError) as raised:
        setup.check(make_config(tmp_path, cache, **changes))
    assert said in str(raised.value)


def test_a_fixed_model_has_no_use_for_budgets(tmp_path, cache):
    config = make_config(tmp_path, cache)
    fixed = replace(config, model=replace(config.model, name="siglip2-tiny-patch8-32"))
    with pytest.raises(ConfigError) as raised:
        setup.check(fixed)
    for name in ("data.patch_budgets", "data.canvas_aspect", "eval.budgets"):
        assert f"{name}: siglip2-tiny-patch8-32 has a fixed resolution" in str(raised.value)
