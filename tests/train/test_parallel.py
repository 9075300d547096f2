"""DDP and FSDP2 on two gloo ranks against one process.

Same losses, same weights; checkpoints move between them.
"""

from pathlib import Path

import pytest
import torch

from ranks import run
from siglip2.config import OptimConfig
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.checkpoint import Progress, checkpoints, load, save
from siglip2.train.optim import adamw
from siglip2.train.parallel import unwrapped, whole_model, wrap
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task

NUM_STEPS = 3
NAMES = (
    "model.vision.patch_embed.weight",
    "model.text.token_embed",
    "model.log_scale",
    "model.bias",
)


def make_task():
    torch.manual_seed(0)
    model = Siglip2(architecture("siglip2-tiny-patch8-32", text_length=8), init_bias=-2.0)
    model.init_weights()
    return Siglip2Task(model)


def make_batch(number, first, last):
    g = torch.Generator().manual_seed(number)
    image = torch.rand(8, 3, 32, 32, generator=g) * 2 - 1
    text = torch.randint(5, 500, (8, 8), generator=g)
    return {"image": image[first:last], "text": text[first:last]}


def train_share(rank, world, strategy, sizes):
    task = wrap(make_task(), strategy)
    # Plain gradient descent: Adam would turn rounding of a zero gradient into a full step.
    step = TrainStep(task, torch.optim.SGD(task.parameters(), lr=0.1))
    first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
    losses = [step(make_batch(i, first, last))["loss"] for i in range(NUM_STEPS)]
    model = whole_model(task)
    state = {f"model.{k}": v for k, v in model.state_dict().items()} if model else {}
    return torch.stack(losses), {name: state[name].clone() for name in NAMES if name in state}


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)], ids=["equal", "uneven"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_like_one(strategy, sizes):
    losses, state = train_share(0, 1, strategy, (8,))
    (one, found), (two, _) = run(2, train_share, strategy, sizes)
    torch.testing.assert_close((one + two) / 2, losses)
    for name in NAMES:
        torch.testing.assert_close(found[name], state[name])


def towers_outside_the_task(rank, world):
    """Embeddings that the sharded towers give before the first step, and after it."""
    task = wrap(make_task(), "fsdp")
    model, batch = task.model, make_batch(0, 0, 8)
    step = TrainStep(task, torch.optim.SGD(task.parameters(), lr=0.1))
    found = []
    for _ in range(2):
        with torch.no_grad():
            images = model.encode_image(batch["image"], normalize=True)
            texts = model.encode_text(batch["text"], normalize=True)
        scale = task.report()["logit_scale"]
        found.append((images, texts, model.forward_vision(batch["image"]).tokens.detach(), scale))
        step(make_batch(0, 4 * rank, 4 * rank + 4))
    return found


@pytest.mark.dist
def test_sharded_towers_embed_outside_the_tasks_forward():
    task, batch = make_task(), make_batch(0, 0, 8)
    step = TrainStep(task, torch.optim.SGD(task.parameters(), lr=0.1))
    found = run(2, towers_outside_the_task)
    for number in range(2):
        model = task.model
        expected = (
            model.encode_image(batch["image"], normalize=True),
            model.encode_text(batch["text"], normalize=True),
            model.forward_vision(batch["image"]).tokens,
            model.log_scale.exp(),
        )
        for share in found:
            for actual, wanted in zip(share[number], expected, strict=True):
                torch.testing.assert_close(actual, wanted.detach())
        step(batch)


def order_share(rank, world, strategy):
    """What happens when in a step: towers, the texts' gather, and both ways of the gradients."""
    task = make_task()
    model, events = task.model, []

    def watch(module, name):
        def forward(module, args, out):
            events.append(name)
            tensor = out if isinstance(out, torch.Tensor) else out.pooled
            tensor.register_hook(lambda grad: events.append(f"gradient of {name}"))

        module.register_forward_hook(forward)

    watch(model.text, "texts")
    watch(model.vision.encoder.blocks[0], "first image block")
    watch(model.vision, "images")
    start_gather = task.sigmoid.start_gather
    task.sigmoid.start_gather = lambda *a, **k: (events.append("gather"), start_gather(*a, **k))[1]
    step = TrainStep(wrap(task, strategy), torch.optim.SGD(task.parameters(), lr=0.1))
    step(make_batch(0, 4 * rank, 4 * rank + 4))
    return events


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_texts_travel_while_the_image_tower_computes(strategy):
    for events in run(2, order_share, strategy):
        assert events == [
            "texts",
            "gather",
            "first image block",
            "images",
            "gradient of images",
            "gradient of first image block",
            "gradient of texts",
        ]


def scalars_share(rank, world):
    task = wrap(make_task(), "fsdp")
    for _ in range(2):  # as two small batches whose gradients add up
        task(make_batch(0, 4 * rank, 4 * rank + 4))[0]["loss"].backward()
    return task.model.log_scale.grad, task.model.bias.grad


@pytest.mark.dist
def test_temperature_and_bias_average_their_gradients_and_keep_no_dimension():
    task = make_task()
    task(make_batch(0, 0, 8))[0]["loss"].backward()
    expected = [2 * p.grad for p in (task.model.log_scale, task.model.bias)]
    for share in run(2, scalars_share):
        for actual, wanted in zip(share, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def poisoned_share(rank, world):
    task = wrap(make_task(), "ddp")
    step = TrainStep(task, adamw(task, OptimConfig()), on_nonfinite="skip")
    before = task.module.model.bias.detach().clone()
    batch = make_batch(0, 4 * rank, 4 * rank + 4)
    if rank == 1:
        batch["image"][0] = torch.nan
    step(batch)
    return step.num_skipped, torch.equal(task.module.model.bias.detach(), before)


@pytest.mark.dist
def test_all_ranks_skip_what_one_rank_met():
    assert run(2, poisoned_share) == [(1, True), (1, True)]


def save_share(rank, world, strategy, folder):
    task = wrap(make_task(), strategy)
    optimizer = adamw(task, OptimConfig(lr=1e-3))
    step = TrainStep(task, optimizer)
    step(make_batch(0, 4 * rank, 4 * rank + 4))
    save(Path(folder), unwrapped(task), optimizer, Progress(1, 8, {}, 0.0), keep=1)
    return float(step(make_batch(1, 4 * rank, 4 * rank + 4))["loss"])


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path, strategy):
    losses = run(2, save_share, strategy, str(tmp_path))
    task = make_task()
    for p in task.parameters():
        p.data.zero_()
    optimizer = adamw(task, OptimConfig(lr=1e-3))
    progress = load(checkpoints(tmp_path)[-1], task, optimizer)
    assert progress.step == 1
    loss = float(TrainStep(task, optimizer)(make_batch(1, 0, 8))["loss"])
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
