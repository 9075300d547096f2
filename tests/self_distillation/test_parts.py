"""A batch in parts after the teacher has seen it, and centres that a dropped step leaves alone."""

import pytest
import torch
from self_distillation.stage_case import make, prepare, trained

from siglip2.self_distillation import take_prepared


def gradients(losses, tower, stage):
    return torch.autograd.grad(sum(losses.values()), trained(tower, stage).values())


@pytest.mark.parametrize(
    "options",
    [{}, {"balance": "sinkhorn", "loss_tokens": "all"}, {"shared_head": True}],
    ids=["published", "sinkhorn-all", "shared-head"],
)
def test_parts_add_up_to_the_batch(options):
    tower, stage = make(**options)
    prepared = prepare(tower, stage)
    whole = stage(tower, prepared).losses
    wanted = gradients(whole, tower, stage)
    parts = [stage(tower, take_prepared(prepared, *at)).losses for at in ((0, 1), (1, 4))]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(x[name] for x in parts), loss, rtol=1e-12, atol=0)
    shares = [gradients(losses, tower, stage) for losses in parts]
    for gold, *found in zip(wanted, *shares, strict=True):
        torch.testing.assert_close(sum(found), gold, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_centres_stay_where_a_step_was_dropped(found_inf):
    (tower, stage), (_, other) = make(), make()
    for made in (stage, other):
        prepare(tower, made)
    before = stage.masked.centre.clone()
    stage.finish_update(found_inf=torch.tensor(found_inf))
    other.finish_update()
    wanted = before if found_inf else other.masked.centre
    assert torch.equal(stage.masked.centre, wanted)


def test_a_dropped_steps_nan_does_not_reach_the_centre():
    tower, stage = make()
    prepare(tower, stage)
    stage.masked._seen.fill_(float("nan"))
    stage.finish_update(found_inf=torch.ones(()))
    assert stage.masked.centre.isfinite().all()
