"""The stage as a whole: against a pass for each image, in every packing."""

from dataclasses import replace

import pytest
import torch
from self_distillation.stage_case import (
    K,
    images,
    inputs,
    make,
    prepare,
    trained,
)

from siglip2.data.types import PackedImages
from siglip2.models.sequences import uniform

EPS = torch.finfo(torch.float64).eps
OPTIONS = {
    "published": {},
    "sinkhorn": {"balance": "sinkhorn"},
    "heads-only": {"ema_scope": "heads"},
    "shared": {"shared_head": True},
    "all-tokens": {"loss_tokens": "all", "visible_weight": 0.25},
    "blocks": {"mask_layout": "blocks"},
}


def logits(out):
    w = out.prototypes
    return out.z @ (w / (w.norm(dim=1, keepdim=True) + 1e-8)).T


def balanced(loss, t):
    """The teacher's probabilities, as DINO and DINOv2 have them."""
    if loss.centre is not None:
        return ((t - loss.centre) / 0.04).softmax(1)
    q = (t / 0.04).exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def each_image(tower, view, mask=None, token=None):
    """A pass of the tower for every image: tokens (N, n, D), pooled (N, D)."""
    h, w = view.grid_hw[0].tolist()
    outs = []
    for i, patches in enumerate(view.patches.split(h * w)):
        seqs, hidden = uniform(1, h * w, patches.device), {}
        if mask is not None:
            hidden = {"mask": mask[i * h * w : (i + 1) * h * w], "mask_token": token}
        outs.append(tower(patches, view.grid_hw[i : i + 1], seqs, torch.float64, **hidden))
    return torch.stack([x.tokens for x in outs]), torch.cat([x.pooled for x in outs])


def by_definition(tower, stage, prepared):
    """Section 2.3 an image at a time; what the stage packs is not packed here."""
    views, masks, options = prepared.views, prepared.masks, stage.config
    heads = stage.heads
    image_head = heads["shared" if options.shared_head else "image"]
    patch_head = heads["shared" if options.shared_head else "patch"]
    teacher = tower if stage.teacher is None else stage.teacher
    with torch.no_grad():
        seen, pooled = each_image(teacher, views.global_view)
        p = balanced(stage.distillation, logits(image_head.teacher(pooled)))
        hidden = masks.mask.view(seen.shape[:2])
        taken = torch.ones_like(hidden) if options.loss_tokens == "all" else hidden
        p_patch = torch.zeros(*hidden.shape, K, dtype=torch.float64)
        p_patch[taken] = balanced(stage.masked, logits(patch_head.teacher(seen[taken])))
    _, local = each_image(tower, views.local_views)
    log_q = (logits(image_head.student(local)) / 0.1).log_softmax(1).unflatten(0, (len(p), -1))
    distillation = -(p[:, None] * log_q).sum(-1).mean()
    tokens, _ = each_image(tower, views.global_view, masks.mask, stage.mask_token())
    log_q = (logits(patch_head.student(tokens.flatten(0, 1))) / 0.1).log_softmax(1)
    losses = -(p_patch * log_q.view_as(p_patch)).sum(-1)  # (B, n)
    masked = losses[hidden].view(len(p), -1).mean(1)
    if options.loss_tokens == "all":
        masked = masked + options.visible_weight * losses[~hidden].view(len(p), -1).mean(1)
    return {"distillation_loss": 0.5 * distillation, "masked_loss": 0.5 * 0.25 * masked.mean()}


def gradients(loss, tower, stage):
    named = trained(tower, stage)
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gold in theirs.items():
        assert (ours[name] - gold).abs().max() <= 2**14 * EPS * gold.abs().max(), name


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_equal_a_pass_for_each_image(name):
    tower, stage = make(**OPTIONS[name])
    prepared = prepare(tower, stage)
    losses = stage(tower, prepared).losses
    wanted = by_definition(tower, stage, prepared)
    assert_close(losses, wanted)
    ours, theirs = (gradients(sum(x.values()), tower, stage) for x in (losses, wanted))
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_branches_add_up_to_the_pass_over_all_views(name):
    tower, stage = make(**OPTIONS[name])
    prepared = prepare(tower, stage)
    batch = inputs(images())
    together = stage(tower, prepared, original=batch)
    other = lambda out: (out.pooled.square().sum() + out.tokens.sin().sum()) / 100
    wanted = gradients(sum(together.losses.values()) + other(together.original), tower, stage)
    whole = tower(*batch, torch.float64)
    torch.testing.assert_close(together.original.pooled, whole.pooled, rtol=1e-12, atol=1e-12)

    stage.config = replace(stage.config, pack="branch")
    assert stage.branches == ("masked", "local")
    found, losses = {}, {}
    for loss in [other(whole), *(stage(tower, prepared, branch=b) for b in stage.branches)]:
        if not isinstance(loss, torch.Tensor):
            losses |= loss.losses
            [loss] = loss.losses.values()
        named = trained(tower, stage)
        grads = torch.autograd.grad(loss, named.values(), allow_unused=True)
        for key, grad in zip(named, grads, strict=True):
            if grad is not None:
                found[key] = found.get(key, 0) + grad
    for key, value in together.losses.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=64 * EPS)
    assert_close(found, wanted)


def test_bytes_may_be_packed_with_views():
    tower, stage = make()
    batch = inputs(images())
    patches = ((batch.patches + 1) * 127.5).round()
    raw = batch._replace(patches=patches.to(torch.uint8))
    floats = batch._replace(patches=patches / 127.5 - 1)
    found, wanted = (
        stage(tower, prepare(tower, stage), original=x).original for x in (raw, floats)
    )
    torch.testing.assert_close(found.pooled, wanted.pooled, rtol=1e-6, atol=1e-6)


def test_naflex_batches_have_square_views():
    grids = torch.tensor([[2, 3], [4, 1], [1, 1]], dtype=torch.int32)
    patches = torch.rand(11, 48, dtype=torch.float64) * 2 - 1
    batch = PackedImages(patches, grids, torch.tensor([0, 6, 10, 11], dtype=torch.int32), 6)
    tower, stage = make()
    prepared = prepare(tower, stage, batch)
    assert prepared.views.global_view.grid_hw.tolist() == [[4, 4]] * 3
    assert prepared.masks.mask.view(3, 16).sum(1).tolist() == [8] * 3
    losses = stage(tower, prepared).losses
    wanted = by_definition(tower, stage, prepared)
    assert sum(losses.values()).item() == pytest.approx(sum(wanted.values()).item(), rel=1e-6)
