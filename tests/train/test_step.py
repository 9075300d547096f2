"""One step: what is updated, by how much, and what happens when a number is not finite."""

import pytest
import torch

from siglip2.config import OptimConfig
from siglip2.errors import NonFiniteLossError
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.optim import adamw, parameter_groups
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task, normalize_batch

OPTIM = OptimConfig(lr=1e-3)


@pytest.fixture
def task():
    model = Siglip2(architecture("siglip2-tiny-patch8-32", text_length=8))
    model.init_weights()
    return Siglip2Task(model)


def make_batch(num=6):
    g = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(num, 3, 32, 32, generator=g) * 2 - 1,
        "text": torch.randint(5, 500, (num, 8), generator=g),
    }


def weights(task):
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def test_learns_a_batch_by_heart(task):
    step, batch = TrainStep(task, adamw(task, OPTIM)), make_batch()
    losses = [float(step(batch)["loss"]) for _ in range(40)]
    assert losses[-1] < losses[0] / 4


def test_decays_weights_of_linear_layers_only(task):
    decayed, rest = parameter_groups(task, 0.1)
    names = {id(p): name for name, p in task.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert {"model.vision.patch_embed.weight", "model.text.head.weight"} <= decayed_names
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed_names)
    rest_names = {names[id(p)] for p in rest["params"]}
    for kept in ("log_scale", "bias", "text.token_embed", "vision.posemb", "vision.pool.probe"):
        assert f"model.{kept}" in rest_names
    assert len(decayed_names) + len(rest_names) == len(names)


def test_learning_rate_follows_the_schedule_from_the_peak(task):
    step = TrainStep(task, adamw(task, OPTIM), schedule=lambda examples: examples / 100)
    assert float(step(make_batch(), examples=25)["lr"]) == pytest.approx(0.25e-3)
    assert float(step(make_batch(), examples=50)["lr"]) == pytest.approx(0.5e-3)


def test_clips_to_the_global_norm(task):
    step = TrainStep(task, torch.optim.SGD(task.parameters(), lr=1.0), grad_clip_norm=1e-3)
    before = weights(task)
    assert float(step(make_batch())["grad_norm"]) > 1e-2
    moved = sum(((p.detach() - before[n]) ** 2).sum() for n, p in task.named_parameters()).sqrt()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def poisoned(batch):
    return {**batch, "image": batch["image"].index_fill(0, torch.tensor([2]), torch.nan)}


@pytest.mark.parametrize("optimizer", ["fused", "sgd"])
def test_a_non_finite_step_names_the_objective_saves_the_batch_and_keeps_the_weights(
    task, tmp_path, optimizer
):
    made = (
        adamw(task, OPTIM) if optimizer == "fused" else torch.optim.SGD(task.parameters(), lr=1.0)
    )
    step = TrainStep(task, made, debug_dir=tmp_path / "debug")
    step(make_batch())
    before = weights(task)
    with pytest.raises(NonFiniteLossError, match=r"step 1: objective sigmoid_loss is not finite"):
        step(poisoned(make_batch()))
    assert all(torch.equal(before[n], p) for n, p in task.named_parameters())
    saved = torch.load(tmp_path / "debug" / "step_000000001.pt", weights_only=True)
    assert torch.isnan(saved["image"][2]).all()
    assert torch.equal(saved["text"], make_batch()["text"])


def test_skip_counts_the_step_and_training_goes_on(task):
    step = TrainStep(task, adamw(task, OPTIM), on_nonfinite="skip")
    before = weights(task)
    step(poisoned(make_batch()))
    assert step.num_skipped == 1
    assert all(torch.equal(before[n], p) for n, p in task.named_parameters())
    step(make_batch())
    assert not all(torch.equal(before[n], p) for n, p in task.named_parameters())


def test_takes_the_transformers_dialect(task):
    batch = make_batch()
    other = {"pixel_values": batch["image"], "input_ids": batch["text"]}
    assert torch.equal(task(batch)[0]["loss"], task(other)[0]["loss"])


def test_rejects_a_batch_of_neither_form():
    with pytest.raises(ValueError, match=r"need a batch with 'image' and 'text'.*got \['pixels'\]"):
        normalize_batch({"pixels": 0})


def test_ids_make_captions_of_one_image_positives(task):
    batch = make_batch()
    plain = task(batch)[0]["loss"]
    ids = {"image_ids": torch.arange(6), "text_ids": torch.arange(6)}
    assert torch.allclose(task({**batch, **ids})[0]["loss"], plain)
    shared = {"image_ids": torch.zeros(6).long(), "text_ids": torch.zeros(6).long()}
    assert not torch.allclose(task({**batch, **shared})[0]["loss"], plain)
