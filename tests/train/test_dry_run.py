"""`siglip2 train --dry-run`: what it counts on fake tensors is what real processes do."""

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import siglip2
from ranks import run
from siglip2.cli import main
from siglip2.config import Config, DataConfig, DistConfig, ModelConfig, TrainConfig
from siglip2.data.types import PackedImages
from siglip2.errors import ConfigError
from siglip2.models.presets import architecture
from siglip2.train import dry_run as module
from siglip2.train import parallel, setup
from siglip2.train.dry_run import dry_run
from siglip2.train.dry_run_table import format_dry_run, human, memory_bytes
from siglip2.train.flops import FLOPS
from siglip2.train.optim import adamw
from siglip2.train.step import TrainStep
from siglip2.train.step_record import CASTS, LOSS, TOWERS, record_step

FIXED, NAFLEX = "siglip2-tiny-patch8-32", "siglip2-tiny-patch8-naflex"
QUICK = "siglip2-quickstart-patch8-32"  # more than one of DDP's buckets


def make_config(name=FIXED, *, strategy="ddp", loss="gather", **options):
    """`options` are fields of the group that has them."""
    groups = {
        "model": ModelConfig(name=name, text_length=8),
        "data": DataConfig(max_num_patches=12),
        "train": TrainConfig(batch_size=4, examples=4000, precision="fp32"),
        "dist": DistConfig(strategy=strategy, loss=loss, check_shapes=False),
    }
    for key, value in options.items():
        group = next(g for g, fields in groups.items() if hasattr(fields, key))
        groups[group] = replace(groups[group], **{key: value})
    return Config(**groups)


def make_real_step(config):
    vocab_size = architecture(config.model.name).text.vocab_size
    model = setup.build_model(config, vocab_size, torch.device("cpu"))
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    task = parallel.wrap(setup.build_task(model, config), config.dist.strategy)
    optimizer = adamw(task, config.optim)
    return TrainStep(task, optimizer, accum_steps=config.train.accum_steps)


def make_real_batch(config):
    B, C = config.train.batch_size, config.data.captions_per_image
    if config.model.name == NAFLEX:
        patches = torch.zeros(B * 12, 3 * 8 * 8, dtype=torch.uint8)
        bounds = torch.arange(B + 1, dtype=torch.int32) * 12
        image = PackedImages(patches, torch.tensor([[3, 4]] * B, dtype=torch.int32), bounds, 12)
    else:
        image = torch.zeros(B, 3, 32, 32)
    ids = torch.arange(B)
    text_ids = ids.repeat_interleave(C)
    text = torch.ones(B * C, 8, dtype=torch.int64)
    return {"image": image, "text": text, "image_ids": ids, "text_ids": text_ids}


@pytest.mark.parametrize("name", [FIXED, "siglip2-base-patch16-256"])
def test_parameters_are_those_of_the_model(name):
    found = dry_run(make_config(name), world_size=1)
    model = siglip2.create_model(name, text_length=8)
    assert found.whole.total == sum(p.numel() for p in model.parameters())
    assert found.whole.vision == sum(p.numel() for p in model.vision.parameters())
    assert found.whole.text == sum(p.numel() for p in model.text.parameters())
    assert found.whole.token_table == model.text.token_embed.numel()
    assert found.local == found.whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"grad_checkpointing": True},
        {"accum_steps": 3, "precision": "bf16"},
        {"accum_steps": 2, "grad_checkpointing": True},
        {"captions_per_image": 2},
        {"name": NAFLEX, "precision": "bf16"},
        {"name": NAFLEX, "accum_steps": 2},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_memory_and_flops_are_those_of_a_real_step(options):
    config = make_config(**options)
    fake = dry_run(config, world_size=1)
    step, batch = make_real_step(config), make_real_batch(config)
    real = record_step(step, batch)
    assert real.saved_bytes[CASTS] > 0 or config.train.precision == "fp32"
    assert fake.step._replace(ready=[]) == real._replace(ready=[])
    moments = [
        step.optimizer.state[p][name] for p in real.ready for name in ("exp_avg", "exp_avg_sq")
    ]
    assert memory_bytes(fake)["AdamW"] == sum(x.nbytes for x in moments)


def test_saved_bytes_are_what_autograd_holds():
    config = make_config()
    step, batch = make_real_step(config), make_real_batch(config)
    model = step.task.model
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    held = {}

    def pack(x):
        held[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        embeddings = model.encode_text(batch["text"])
    given = weights | {batch["text"].untyped_storage()._cdata}
    expected = sum(x.nbytes() for key, x in held.items() if key not in given)
    # The loss keeps the embeddings as well: they are the tower's, too.
    found = record_step(step, batch).saved_bytes["text tower"]
    assert found == expected + embeddings.nbytes


def test_checkpointing_saves_less_and_recomputes_a_block():
    plain, checkpointed = (
        dry_run(make_config(grad_checkpointing=on), world_size=1).step for on in (False, True)
    )
    assert checkpointed.saved_bytes["vision tower"] < plain.saved_bytes["vision tower"] / 2
    assert 0 < checkpointed.recomputed_bytes < plain.saved_bytes["vision tower"]
    assert checkpointed.flops[TOWERS] > 1.2 * plain.flops[TOWERS]
    assert checkpointed.flops[LOSS] == plain.flops[LOSS]


def test_flops_are_those_of_torchs_counter():
    config = make_config()
    fake = dry_run(config, world_size=1).step.flops
    ours = torch.ops.siglip2
    lengths = {4 * 16: 16, 4 * 8: 8}  # rows of the pack to those of a sequence

    def attention(products):
        return lambda qkv: 2 * products * qkv[0][0] * lengths[qkv[0][0]] * 64

    def pool(products):
        return lambda x, u: 2 * products * x[0] * u[0] * u[1]

    def embed(products):
        return lambda patches, weight: 2 * products * patches[0] * weight[0] * weight[1]

    formulas = {
        ours.varlen_attention: lambda qkv, *_, **__: attention(2)(qkv),
        ours.varlen_attention_bwd: lambda dout, qkv, *_, **__: attention(5)(qkv),
        ours.map_pool: lambda x, u, *_, **__: pool(2)(x, u),
        ours.map_pool_bwd: lambda dm, x, u, *_, **__: pool(4)(x, u),
        ours.patch_embed: lambda patches, weight, *_, **__: embed(1)(patches, weight),
        ours.patch_embed_bwd: lambda dout, patches, weight, *_, **__: embed(1)(patches, weight),
        ours.sigmoid_loss: lambda img, txt, *_, **__: 6 * img[0] * txt[0] * img[1],
    }
    step, batch = make_real_step(config), make_real_batch(config)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step(batch)
    assert fake[LOSS] == 6 * 4 * 4 * 64
    assert fake[TOWERS] + fake[LOSS] == counter.get_total_flops()


class OurOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "siglip2":
            self.seen.add(func._overloadpacket)
        return func(*args, **(kwargs or {}))


def test_every_op_of_ours_that_multiplies_has_a_formula():
    config = make_config(NAFLEX)
    step, batch = make_real_step(config), make_real_batch(config)
    with OurOps() as ops:
        step(batch)
    ours = torch.ops.siglip2
    without = {ours.unit_rows, ours.unit_rows_grad}  # no products
    without |= {ours.bias_gelu, ours.bias_gelu_bwd}
    without |= {ours.posemb_resample, ours.posemb_resample_bwd}  # a few cells a token
    assert torch.ops.siglip2.sigmoid_loss in ops.seen
    assert ops.seen - without <= set(FLOPS)


RUNS = {
    "ddp-buckets": {"strategy": "ddp", "name": QUICK},
    "ddp-parts": {"strategy": "ddp", "name": QUICK, "accum_steps": 2, "precision": "bf16"},
    "ddp-ring": {"strategy": "ddp", "loss": "ring"},
    "fsdp-bf16": {"strategy": "fsdp", "precision": "bf16"},
    "fsdp-ring-parts": {"strategy": "fsdp", "loss": "ring", "accum_steps": 2},
    "fsdp-checkpointed": {"strategy": "fsdp", "grad_checkpointing": True},
}


def record_share(rank, world):
    found = {}
    for name, options in RUNS.items():
        config = make_config(**options)
        step, batch = make_real_step(config), make_real_batch(config)
        for _ in range(2):  # DDP makes its final buckets in the second
            step(batch)
        local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in step._parameters)
        found[name] = [tuple(c) for c in record_step(step, batch).collectives], local
    return found


@pytest.fixture(scope="module")
def two_processes():
    return run(2, record_share)[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_collectives_are_those_of_two_processes(name, two_processes):
    found = dry_run(make_config(**RUNS[name]), world_size=2)
    real, local = two_processes[name]
    assert Counter(map(tuple, found.step.collectives)) == Counter(real)
    assert found.local.total == local


@pytest.mark.parametrize("options", [{}, {"accum_steps": 2}], ids=["whole", "parts"])
def test_a_longer_ring_is_worked_out_as_it_would_run(options, monkeypatch):
    config = make_config(loss="ring", **options)
    short = dry_run(config, world_size=6).step
    monkeypatch.setattr(module, "_RING_RANKS", 6)
    whole = dry_run(config, world_size=6).step
    assert Counter(short.collectives) == Counter(whole.collectives)
    assert short.flops == whole.flops
    # But for a few scalars of each hop.
    assert 0 <= whole.loss_bytes - short.loss_bytes < 2 * 48


@pytest.mark.parametrize("num_ranks", [3, 5, 80])
def test_fsdp_is_worked_out_as_it_would_run(num_ranks, monkeypatch):
    config = make_config(strategy="fsdp")
    few = dry_run(config, world_size=num_ranks)
    monkeypatch.setattr(module, "_FSDP_RANKS", num_ranks)
    all_ = dry_run(config, world_size=num_ranks)
    assert Counter(few.step.collectives) == Counter(all_.step.collectives)


def test_gather_takes_memory_of_the_global_batch_and_ring_of_the_local_one():
    def loss_bytes(loss, world_size):
        return dry_run(make_config(loss=loss), world_size=world_size).step.loss_bytes

    assert loss_bytes("gather", 64) > 3.5 * loss_bytes("gather", 16)
    assert loss_bytes("ring", 64) - loss_bytes("ring", 16) < 48 * 64  # a few numbers a rank
    assert loss_bytes("gather", 64) > 10 * loss_bytes("ring", 64)


def test_sharding_leaves_a_device_its_share():
    ddp, fsdp = (
        dry_run(make_config(strategy=strategy), world_size=4) for strategy in ("ddp", "fsdp")
    )
    assert ddp.local == ddp.whole == fsdp.whole
    # A probe of one row cannot be cut: the first device has all of it.
    assert fsdp.local.vision == (fsdp.whole.vision - 64) / 4 + 64
    assert memory_bytes(fsdp)["AdamW"] < memory_bytes(ddp)["AdamW"] / 3.9


def test_accumulation_lets_fsdp_keep_all_gradients_until_the_last_part():
    one, two = (dry_run(make_config(strategy="fsdp", accum_steps=n), world_size=4) for n in (1, 2))
    assert two.strategy_bytes > one.strategy_bytes
    assert two.strategy_bytes > 4 * two.whole.total


def test_the_process_is_left_as_it_was():
    before = parallel.fully_shard
    dry_run(make_config(strategy="fsdp"), world_size=4)
    assert parallel.fully_shard is before
    assert not dist.is_initialized()


def test_a_process_group_is_refused(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="need a process without a process group"):
            dry_run(make_config(), world_size=2)
    finally:
        dist.destroy_process_group()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="accum_steps"):
        dry_run(make_config(accum_steps=9), world_size=1)


def test_the_table_says_what_was_assumed():
    text = format_dry_run(dry_run(make_config(NAFLEX, pretrained="some/model"), world_size=1))
    assert "12 patches each (data.max_num_patches, the worst case)" in text
    assert "weights of some/model not read" in text
    assert "one device: nothing is sent" in text


def test_the_table_has_the_ends_of_the_schedule():
    config = make_config(batch_size=2)
    config = replace(config, optim=replace(config.optim, warmup_examples=400, lr=0.5))
    lines = format_dry_run(dry_run(config, world_size=2)).splitlines()
    rates = {line.split()[2]: line.split()[-4:] for line in lines if "learning rate" in line}
    assert rates["first"] == ["first", "0", "step", "0"]
    assert rates["warm-up"] == ["done", "0.5", "step", "100"]
    assert rates["last"][-1] == "999"
    long = replace(config, optim=replace(config.optim, warmup_examples=10_000))
    assert "longer than the run" in format_dry_run(dry_run(long, world_size=2))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (5 << 40, "5.00 TiB")],
)
def test_bytes_are_read_with_three_digits(num_bytes, text):
    assert human(num_bytes) == text


ARGV = ["train", "--config", "b16-256", "--model.name", FIXED, "--dry-run"]


def test_the_command_prints_and_writes_nothing(capsys, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    assert main([*ARGV, "--world-size", "256", "--dist.strategy", "fsdp"]) == 0
    out, error = capsys.readouterr()
    assert "256 x 512 (fsdp, gather)" in out
    for part in ("parameters", "memory of a device", "steps", "collectives a step", "FLOPs"):
        assert f"\n{part}" in out
    assert error == ""
    assert not recwarn.list
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", ["0", "many", "-2", "1.5", "²", ""])
def test_a_wrong_world_size_is_one_line(capsys, size):
    assert main([*ARGV, f"--world-size={size}"]) == 1
    error = capsys.readouterr().err
    assert f"need the number of processes, 1 or more; got {size!r}" in error
    assert len(error.splitlines()) == 1


def test_a_world_size_without_a_value_is_one_line(capsys):
    assert main([*ARGV, "--world-size"]) == 1
    assert "need the number of processes" in capsys.readouterr().err


def test_a_world_size_is_for_the_dry_run(capsys):
    assert main(["train", "--world-size", "2"]) == 1
    assert "need --dry-run with it; got it alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "loss"), [("fsdp", "gather"), ("ddp", "ring")])
def test_a_large_model_on_2048_devices(strategy, loss):
    config = make_config("siglip2-so400m-patch14-384", strategy=strategy, loss=loss)
    found = dry_run(replace(config, train=replace(config.train, batch_size=16)), world_size=2048)
    sent = Counter(c.what for c in found.step.collectives)
    if loss == "gather":
        texts = [c for c in found.step.collectives if c.what == "text embeddings"]
        assert [c.num_bytes for c in texts] == [2048 * 16 * 1152 * 4]
        assert sent["gradients (FSDP2)"] == 2 * 27 + 2
    else:
        assert sent["texts and their gradients (ring)"] == 2047 + 2048
    assert found.step.flops[LOSS] == 6 * 16 * (2048 * 16) * 1152
    assert "2,048 x 16" in format_dry_run(found)
