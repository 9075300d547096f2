"""`--dry-run` of a run with self-distillation: its last stage, as real tensors have it."""

from dataclasses import replace

import pytest
import torch
from train.ssl_case import B, make_config

from siglip2.config import DataConfig, DistConfig, LocCaConfig
from siglip2.data.types import PackedImages
from siglip2.locca.tasks import TASKS, TaskText
from siglip2.models.presets import architecture
from siglip2.train import setup
from siglip2.train.dry_run import dry_run
from siglip2.train.dry_run_table import format_dry_run, memory_bytes
from siglip2.train.optim import adamw
from siglip2.train.ssl_stage import begin_stage
from siglip2.train.step import TrainStep
from siglip2.train.step_record import STAGE, VISION, record_step

NAFLEX = "siglip2-tiny-patch8-naflex"


def make(name=None, *, locca=False, **options):
    config = make_config(**options.pop("ssl", {}))
    config = replace(
        config,
        data=DataConfig(max_num_patches=12),
        train=replace(config.train, **options),
        locca=LocCaConfig(weight=float(locca), length=8),
    )
    return replace(config, model=replace(config.model, name=name)) if name else config


def make_real_step(config):
    vocab_size = architecture(config.model.name).text.vocab_size
    model = setup.build_model(config, vocab_size, torch.device("cpu"))
    task = setup.build_task(model, replace(config, dist=DistConfig(check_shapes=False)))
    optimizer = adamw(task, config.optim)
    begin_stage(task, optimizer, config)
    return TrainStep(task, optimizer, accum_steps=config.train.accum_steps)


def make_real_batch(config):
    image = torch.zeros(B, 3, 32, 32)
    if config.model.name == NAFLEX:
        patches = torch.zeros(B * 12, 3 * 8 * 8, dtype=torch.uint8)
        bounds = torch.arange(B + 1, dtype=torch.int32) * 12
        image = PackedImages(patches, torch.tensor([[3, 4]] * B, dtype=torch.int32), bounds, 12)
    ids, text = torch.arange(B), torch.ones(B, 8, dtype=torch.int64)
    batch = {"image": image, "text": text, "image_ids": ids, "text_ids": ids, "view_seed": 0}
    if config.locca.weight:
        batch["task_texts"] = [[TaskText(task, (0,) * 8, 1) for task in TASKS]] * B
    return batch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ssl": {"pack": "branch"}, "precision": "bf16"},
        {"ssl": {"balance": "sinkhorn", "mask_layout": "blocks"}, "locca": True},
        {"ssl": {"ema_scope": "heads"}, "accum_steps": 2},
        {"name": NAFLEX},
    ],
    ids=["plain", "branch-bf16", "sinkhorn-locca", "heads-parts", "naflex"],
)
def test_memory_and_flops_are_those_of_a_real_step(options):
    config = make(**options)
    fake = dry_run(config, world_size=1)
    step, batch = make_real_step(config), make_real_batch(config)
    real = record_step(step, batch)
    # All but for where sequences lie: a few numbers of each, which the dry run has on real tensors.
    few = 64 * B * (2 + config.ssl.num_local + 3 * bool(config.locca.weight))
    for part, size in real.saved_bytes.items():
        assert 0 <= size - fake.step.saved_bytes[part] < (few if part == STAGE else 1), part
    assert abs(real.loss_bytes - fake.step.loss_bytes) < few
    assert fake.step.flops == real.flops
    assert fake.step.recomputed_bytes == real.recomputed_bytes
    assert fake.step.saved_bytes[STAGE] > 0
    assert fake.step.flops[STAGE] > 0
    stage = step.task.ssl
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in stage.parameters() if not p.requires_grad)
    assert (fake.whole.stage, fake.whole.teacher) == (trained, kept)
    assert memory_bytes(fake)["teacher"] == 4 * kept
    moments = [
        step.optimizer.state[p][name] for p in real.ready for name in ("exp_avg", "exp_avg_sq")
    ]
    assert memory_bytes(fake)["AdamW"] == sum(x.nbytes for x in moments)


def test_branches_hold_fewer_activations():
    packed, apart = (dry_run(make(ssl={"pack": x}), world_size=1) for x in ("all", "branch"))
    assert apart.step.saved_bytes[VISION] < 0.6 * packed.step.saved_bytes[VISION]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_table_says_which_stage_it_counts(strategy):
    config = replace(make(), dist=DistConfig(strategy=strategy, check_shapes=False))
    found = dry_run(config, world_size=4)
    text = format_dry_run(found)
    assert "a step of the last stage, from 80% on" in text
    assert f"teacher, averaged       {found.whole.teacher:,}" in text
    assert found.local.stage < found.whole.stage or strategy == "ddp"
