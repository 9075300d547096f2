"""A small stage whose every parameter matters, for the tests of one process and of several."""

import torch

from siglip2.models.inputs import VisionInputs, vision_inputs
from siglip2.models.presets import TowerSize, VisionConfig
from siglip2.models.sequences import uniform
from siglip2.models.vision import VisionTower
from siglip2.self_distillation import HeadConfig, Masks, SslConfig, SslStage, ViewConfig, Views

K = 19
SIZE = TowerSize(width=16, depth=2, mlp_width=20, num_heads=2)
VISION = VisionConfig(size=SIZE, patch_size=4, image_size=16)
HEAD = HeadConfig(hidden_width=24, bottleneck=8, prototypes=K)


def config(**changes):
    start = {"head": HEAD, "views": ViewConfig(num_local=3, local_px=8), "size_factor": 0.5}
    return SslConfig(**{**start, **changes})


def randomize(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return module


def make(dtype=torch.float64, seed=0, momentum=None, **changes):
    """A student's tower and a stage that has begun and moved on: its teacher differs."""
    torch.manual_seed(seed)
    tower = VisionTower(VISION)
    tower.init_weights()
    randomize(tower)
    stage = SslStage(config(**changes), VISION, momentum=momentum)
    stage.begin(tower)
    for head in stage.heads.values():
        randomize(head, 1)
    if stage.teacher is not None:
        randomize(stage.teacher, 2)
    for loss in stage.losses():
        if loss.centre is not None:
            loss.centre.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return tower.to(dtype), stage.to(dtype)


def images(num=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, 16, 16, generator=generator, dtype=dtype) * 2 - 1


def inputs(batch):
    return vision_inputs(batch, VISION, torch.device("cpu"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prepare(tower, stage, batch=None, seed=0):
    batch = images() if batch is None else batch
    return stage.prepare(tower, batch, generator=generator(seed), dtype=torch.float64)


def trained(tower, stage):
    named = {f"tower.{name}": p for name, p in tower.named_parameters()}
    named |= {f"stage.{name}": p for name, p in stage.named_parameters() if p.requires_grad}
    return named


def part(views, masks, first, last):
    """Views and masks of images [first, last): 16 patches of which 8 are hidden, 3 local views."""

    def images_of(view, start, stop, length):
        patches = view.patches[start * length : stop * length]
        seqs = uniform(stop - start, length, patches.device)
        return VisionInputs(patches, view.grid_hw[start:stop], seqs)

    mine = Views(
        images_of(views.global_view, first, last, 16),
        images_of(views.local_views, 3 * first, 3 * last, 4),
    )
    rows = slice(16 * first, 16 * last)
    index = masks.index[8 * first : 8 * last] - 16 * first
    shares = masks.hidden_share[rows], masks.visible_share[rows]
    return mine, Masks(masks.mask[rows], index, *shares, masks.num_hidden[first:last])
