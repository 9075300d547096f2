"""The captioning decoder in training: one loss with the towers', in parts, over ranks, in a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ranks import run
from siglip2.cli import main
from siglip2.config import LocCaConfig, QuickstartConfig
from siglip2.data.sources import open_source
from siglip2.locca import LocCaLoss
from siglip2.locca.tasks import TaskText
from siglip2.models.decoder import Decoder, decoder_config
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.recipe.presets import preset
from siglip2.train.accumulate import accumulate
from siglip2.train.checkpoint import checkpoints
from siglip2.train.parallel import unwrapped, whole_decoder, wrap
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task
from siglip2.train.trainer import Run, loop, train

B = 8


def make_task(dtype=torch.float64, **options):
    torch.manual_seed(0)
    arch = architecture("siglip2-tiny-patch8-32", text_length=8)
    model = Siglip2(arch, init_bias=-2.0, dtype=dtype)
    model.init_weights()
    decoder = Decoder(decoder_config(arch, length=16))
    decoder.init_weights()
    torch.nn.init.normal_(decoder.own_head, std=0.1)
    task = Siglip2Task(model, locca=LocCaLoss(decoder, **options), locca_weight=0.5)
    return task.to(dtype)


def make_batch(first=0, last=B, dtype=torch.float64):
    """Every third image has regions; lengths differ."""
    g = np.random.default_rng(0)
    image = torch.from_numpy(g.uniform(-1, 1, (B, 3, 32, 32))).to(dtype)
    text = torch.from_numpy(g.integers(5, 500, (B, 8)))
    said = []
    for i in range(B):
        tasks = ("caption", "refer", "ground") if i % 3 == 0 else ("caption",)
        texts = [TaskText(t, tuple(g.integers(5, 500, 4 + i).tolist()), 2) for t in tasks]
        said.append([text._replace(is_parallel=i % 2 == 0) for text in texts[:1]] + texts[1:])
    batch = {"image": image, "text": text, "task_texts": said}
    return {name: x[first:last] for name, x in batch.items()}


def gradients(task):
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def test_the_loss_is_the_sum_of_both_and_reaches_every_weight():
    task, batch = make_task(), make_batch()
    losses, report = task(batch)
    expected = losses["sigmoid_loss"] + 0.5 * losses["locca_loss"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-7)
    assert 0 <= report["token_accuracy"] <= 1
    losses["loss"].backward()
    untouched = [name for name, p in task.named_parameters() if p.grad is None]
    assert not untouched
    # The decoder alone gives the same, on the tokens of the same pass.
    vision = task.model.forward_vision(batch["image"]).tokens
    alone = task.locca(vision, task.locca.pack_tokens(batch["task_texts"], [16] * B))
    assert alone.loss.item() == pytest.approx(losses["locca_loss"].item(), rel=1e-7)


@pytest.mark.parametrize("per_token", [False, True])
def test_parts_give_the_gradients_of_the_whole(per_token):
    whole, parted = make_task(per_token=per_token), make_task(per_token=per_token)
    expected = whole(make_batch())[0]
    expected["loss"].backward()
    found, _ = accumulate(parted, make_batch(), 3)
    for name in ("loss", "sigmoid_loss", "locca_loss"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-6), name
    ours, theirs = gradients(parted), gradients(whole)
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))


def test_a_batch_without_texts_is_one_clear_error():
    batch = make_batch()
    del batch["task_texts"]
    with pytest.raises(ValueError, match="need a batch with 'task_texts' for the captioning decod"):
        make_task()(batch)


def train_share(rank, world, strategy, sizes):
    task = wrap(make_task(torch.float32), strategy)
    step = TrainStep(task, torch.optim.SGD(task.parameters(), lr=0.1))
    first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
    losses = [step(make_batch(first, last, torch.float32))["locca_loss"] for _ in range(3)]
    decoder = whole_decoder(task)
    return torch.stack(losses), decoder and {k: v.clone() for k, v in decoder.state_dict().items()}


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_uneven_ranks_train_like_one(strategy):
    """5 images and 3 on two ranks; regions on one and a half of them."""
    losses, state = train_share(0, 1, strategy, (B,))
    (one, found), (two, other) = run(2, train_share, strategy, (5, 3))
    torch.testing.assert_close((one + two) / 2, losses)
    for name, x in state.items():
        torch.testing.assert_close(found[name], x, msg=name)
    assert (other is None) == (strategy == "fsdp") or other is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def make_config(folder, cache, *, steps, name="locca-quickstart", **changes):
    start = preset(name)
    return replace(
        start,
        data=replace(start.data, quickstart=QuickstartConfig(concepts=60, cache_dir=cache)),
        train=replace(
            start.train,
            output_dir=str(folder),
            examples=start.train.batch_size * steps,
            log_every_steps=2,
            checkpoint_every_steps=4,
        ),
        optim=replace(start.optim, warmup_examples=5 * start.train.batch_size),
        eval=replace(start.eval, max_images=12),
        **changes,
    )


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/locca_loss"] for row in rows if "train/locca_loss" in row}


def test_the_preset_learns_is_evaluated_and_speaks(tmp_path, cache, capsys):
    """The quick start's scenes, model and settings; a hundredth of its steps."""
    folder = tmp_path / "run"
    train(make_config(folder, cache, steps=40))
    losses = losses_of(folder)
    assert losses[40] < 0.8 * losses[2]
    found = json.loads((folder / "eval.json").read_text())["locca"]["held_out"]
    assert {"accuracy", "constant_accuracy"} <= set(found["refer"])
    assert (folder / "export/decoder.safetensors").is_file()
    assert "Captions and boxes" in (folder / "report.html").read_text()
    picture = tmp_path / "scene.png"

    picture.write_bytes(
        open_source("scenes:heldout", make_config(folder, cache, steps=1).data)[0].image
    )
    capsys.readouterr()
    assert main(["caption", str(picture), "--model", str(folder)]) in (None, 0)
    assert capsys.readouterr().out.startswith(f"{picture}: ")


def test_a_resumed_run_draws_the_same_texts(tmp_path, cache):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    loop(Run(make_config(whole, cache, steps=6)))
    first = Run(make_config(parted, cache, steps=6))
    first.num_steps = 4
    loop(first)
    first.save()
    assert len(checkpoints(parted / "checkpoints")) == 1
    loop(Run(make_config(parted, cache, steps=6)))
    assert losses_of(parted) == losses_of(whole)


def test_captions_alone_train_a_decoder(tmp_path, cache):
    """Examples without regions contribute to captioning only."""
    config = make_config(
        tmp_path, cache, steps=6, name="quickstart", locca=LocCaConfig(weight=1.0, length=32)
    )
    started = Run(replace(config, data=replace(config.data, val=None)))
    loop(started)
    losses = losses_of(tmp_path)
    assert losses[6] < losses[2]
    assert unwrapped(started.task).locca.decoder.config.size.depth == 1
