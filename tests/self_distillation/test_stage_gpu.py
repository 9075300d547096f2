"""On a GPU: the CPU's losses, no wait for the device, bfloat16 within its rounding, determinism."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from self_distillation.stage_case import images, make, trained

from siglip2.models.inputs import VisionInputs
from siglip2.models.sequences import uniform
from siglip2.self_distillation import Masks, Views
from siglip2.self_distillation.crops import Boxes, Canvas, resized_crops

pytestmark = pytest.mark.gpu
OPTIONS = {
    "published": {},
    "sinkhorn": {"balance": "sinkhorn"},
    "all-tokens": {"loss_tokens": "all"},
    "blocks": {"mask_layout": "blocks"},
    "heads-only": {"ema_scope": "heads"},
}


@contextmanager
def nothing_waits():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_gpu(views, masks):
    def there(view, length):
        seqs = uniform(len(view.grid_hw), length, torch.device("cuda"))
        return VisionInputs(view.patches.cuda(), view.grid_hw, seqs)

    views = Views(there(views.global_view, 16), there(views.local_views, 4))
    return views, Masks(*(x.cuda() for x in masks[:-1]), masks.num_hidden)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_waits_for_nothing_and_repeats_to_the_bit(name):
    found = []
    for _ in range(2):
        tower, stage = make(torch.float32, **OPTIONS[name])
        tower, stage = tower.cuda(), stage.cuda()
        batch, generator = (
            images(dtype=torch.float32).cuda(),
            torch.Generator("cuda").manual_seed(0),
        )
        parameters = list(trained(tower, stage).values())
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        values = []
        for number in range(3):
            with nothing_waits() if number else nullcontext():  # the first compiles kernels
                prepared = stage.prepare(tower, batch, generator=generator)
                loss = sum(stage(tower, prepared).losses.values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                stage.update_teacher(tower, number)
                values.append(loss.detach())
        found.append([*values, *(p.detach() for p in parameters), *stage.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_equal_the_cpus(name):
    """Gold is the CPU in float64; the GPU may err as the CPU does in float32, and a bit more."""
    results = {}
    for kind, dtype in (("gold", torch.float64), ("cpu", torch.float32), ("cuda", torch.float32)):
        tower, stage = make(torch.float64, **OPTIONS[name])
        generator = torch.Generator().manual_seed(0)
        drawn = stage.prepare(tower, images(), generator=generator, dtype=torch.float64)
        stage.skip_update()
        tower, stage = tower.to(dtype), stage.to(dtype)
        views, masks = drawn.views, drawn.masks
        if kind == "cuda":
            tower, stage = tower.cuda(), stage.cuda()
            views, masks = on_gpu(views, masks)
        prepared = stage.ask(tower, views, masks, dtype=dtype)
        losses = stage(tower, prepared).losses
        named = trained(tower, stage)
        grads = torch.autograd.grad(sum(losses.values()), named.values())
        results[kind] = {**losses, **dict(zip(named, grads, strict=True))}
    for key, gold in results["gold"].items():
        size = gold.abs().max()
        errors = [
            (results[kind][key].detach().cpu().double() - gold).abs().max()
            for kind in ("cpu", "cuda")
        ]
        allowed = 4 * errors[0] + 2**10 * torch.finfo(torch.float32).eps * size
        assert errors[1] <= allowed, key


def test_bfloat16_trains_towards_the_same_losses():
    tower, stage = make(torch.float32)
    tower, stage, batch = tower.cuda(), stage.cuda(), images(dtype=torch.float32).cuda()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator("cuda").manual_seed(0)
        prepared = stage.prepare(tower, batch, generator=generator, dtype=dtype)
        losses = stage(tower, prepared).losses
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in trained(tower, stage).values())
        found[dtype] = torch.stack(list(losses.values())).detach()
    torch.testing.assert_close(*found.values(), rtol=0.1, atol=0)


def test_crops_equal_the_cpus():
    g = torch.Generator().manual_seed(0)
    pixels, size = (
        torch.rand(3, 3, 40, 56, generator=g),
        torch.tensor([[40.0, 56], [8, 50], [40, 9]]),
    )
    sides = (size[:, None] * (0.3 + 0.5 * torch.rand(3, 5, 2, generator=g))).round()
    boxes = Boxes(((size[:, None] - sides) / 2).floor(), sides)
    flip = torch.rand(3, 5, generator=g) < 0.5
    wanted = resized_crops(Canvas(pixels, size), boxes, 16, flip)
    there = Canvas(pixels.cuda(), size.cuda())
    found = resized_crops(there, Boxes(boxes.corner.cuda(), sides.cuda()), 16, flip.cuda())
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)
