"""Two and four ranks give one process's losses and weights on the same global batch, in float64."""

import pytest
import torch

from ranks import run
from siglip2.losses import SigLipLoss
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.parallel import wrap
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task

NUM_STEPS = 50
BATCH = 8  # over all ranks
WAYS = [(strategy, loss) for strategy in ("ddp", "fsdp") for loss in ("gather", "ring")]


def make_batch(number, first, last):
    g = torch.Generator().manual_seed(number % 4)  # seen again: the loss falls
    image = torch.rand(BATCH, 3, 32, 32, generator=g, dtype=torch.float64) * 2 - 1
    text = torch.randint(5, 500, (BATCH, 8), generator=g)
    return {"image": image[first:last], "text": text[first:last]}


def curve(rank, world, strategy, loss, *, num_steps=NUM_STEPS, accum_steps=1):
    torch.manual_seed(0)
    arch = architecture("siglip2-tiny-patch8-32", text_length=8)
    model = Siglip2(arch, init_bias=-2.0, dtype=torch.float64)
    model.init_weights()
    task = Siglip2Task(model.double(), loss=SigLipLoss(dist_impl=loss, normalize=True))
    task = wrap(task, strategy)
    # Plain gradient descent: Adam would turn rounding of a zero gradient into a full step.
    sgd = torch.optim.SGD(task.parameters(), lr=0.05)
    step = TrainStep(task, sgd, accum_steps=accum_steps)
    share = BATCH // world
    batches = (make_batch(i, rank * share, (rank + 1) * share) for i in range(num_steps))
    losses = torch.stack([step(batch)["loss"] for batch in batches])
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return losses, [float(p.detach().norm()) for p in whole]


def curves(rank, world):
    return [curve(rank, world, *way) for way in WAYS]


def curves_in_parts(rank, world):
    return [curve(rank, world, *way, num_steps=10, accum_steps=3) for way in WAYS]


def check(found, losses, norms):
    """Each way's mean loss over ranks, and the norm of every whole weight, are the given ones."""
    for way, shares in zip(WAYS, zip(*found, strict=True), strict=True):
        mean = torch.stack([share_losses for share_losses, _ in shares]).mean(0)
        assert mean.tolist() == pytest.approx(losses.tolist(), rel=1e-9), way
        for _, share_norms in shares:
            assert share_norms == pytest.approx(norms, rel=1e-9), way


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_give_the_curve_of_one_process():
    losses, norms = curve(0, 1, "ddp", "gather")
    assert losses.dtype == torch.float64
    assert losses[-1] < losses[0] / 2
    for world in (2, 4):
        check(run(world, curves), losses, norms)


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_that_compute_their_batch_in_parts_give_the_curve_of_one_process():
    check(run(2, curves_in_parts), *curve(0, 1, "ddp", "gather", num_steps=10))
