"""`torchrun -m siglip2 train` on a folder of images: shared, killed, resumed, and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ranks import run
from siglip2.config import (
    Config,
    DataConfig,
    DistConfig,
    ModelConfig,
    OptimConfig,
    QuickstartConfig,
    TrainConfig,
)
from siglip2.data.quickstart import quickstart_dir
from siglip2.errors import ConfigError
from siglip2.train.run_dir import to_yaml
from siglip2.train.trainer import Run, loop

NUM_STEPS = 30
BATCH = 8  # over all ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures with one caption each, so that a batch does not depend on who reads it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    g = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(256, (32, 32, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture number {i}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return quickstart_dir(QuickstartConfig(concepts=4, cache_dir=cache)) / "tokenizer.json"


def make_config(
    folder, data, tokenizer, *, ranks, dist=None, steps=NUM_STEPS, text_length=8, eval_every=0
):
    return Config(
        model=ModelConfig(name="siglip2-tiny-patch8-32", text_length=text_length, init_bias=-2.0),
        data=DataConfig(
            train=str(data),
            val=str(data) if eval_every else None,
            tokenizer=str(tokenizer),
            workers=0,
            cache_images=True,
        ),
        optim=OptimConfig(warmup_examples=4 * BATCH),
        train=TrainConfig(
            output_dir=str(folder),
            examples=BATCH * steps,
            batch_size=BATCH // ranks,
            precision="fp32",
            log_every_steps=1,
            checkpoint_every_steps=2,
            eval_every_steps=eval_every,
        ),
        dist=dist or DistConfig(),
    )


def losses(folder) -> dict[int, float]:
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def start(config: Config, ranks: int) -> subprocess.Popen:
    """`torchrun -m siglip2 train`, or without torchrun for one process."""
    path = Path(f"{config.train.output_dir}.yaml")
    path.write_text(to_yaml(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [
        sys.executable,
        *(launcher if ranks > 1 else []),
        *("-m", "siglip2", "train", "--config", str(path)),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while max(losses(folder), default=0) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def process_of_rank(launcher: int, rank: int) -> int:
    """The child of torchrun whose environment says RANK=rank."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((proc / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (
                proc / "environ"
            ).read_bytes().split(b"\0"):
                return int(proc.name)
        except OSError:
            continue
    raise AssertionError(f"torchrun {launcher} has no process of rank {rank}")


def kill_rank(process: subprocess.Popen, rank: int) -> str:
    """SIGKILL to one rank; what torchrun and the others then print."""
    os.kill(process_of_rank(process.pid, rank), signal.SIGKILL)
    killed = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert process.returncode not in (0, None)
    return out


def check_last_words(out: str, *, dead: int, left: int) -> None:
    assert f"rank      : {dead} (local_rank: {dead})" in out, out
    assert "Signal 9 (SIGKILL)" in out
    ours = [line for line in out.splitlines() if line.startswith("siglip2 train:")]
    assert len(ours) == 1, out
    assert ours[0].startswith(f"siglip2 train: rank {left}: ")
    assert "Start the same command again" in ours[0]
    assert "siglip2/train/" not in out  # no frames of ours; torchrun prints its own


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_goes_from_two_ranks_to_one_and_back_like_one_that_was_never_stopped(
    tmp_path, data, tokenizer
):
    loop(Run(make_config(tmp_path / "whole", data, tokenizer, ranks=1)))
    expected = losses(tmp_path / "whole")
    assert expected[NUM_STEPS] < expected[1]

    folder = tmp_path / "moved"
    ring = DistConfig(loss="ring")
    two = start(make_config(folder, data, tokenizer, ranks=2, dist=ring), 2)
    wait_for_step(two, folder, 5)
    check_last_words(kill_rank(two, 1), dead=1, left=0)

    one = start(make_config(folder, data, tokenizer, ranks=1), 1)
    wait_for_step(one, folder, 15)
    one.kill()
    assert "continuing" in one.communicate()[0]

    sharded = DistConfig(strategy="fsdp")
    last = start(make_config(folder, data, tokenizer, ranks=2, dist=sharded, eval_every=10), 2)
    out, _ = last.communicate(timeout=180)
    assert last.returncode == 0, out
    assert "continuing" in out
    assert (folder / "report.html").is_file()
    assert '"step": 20, "val/' in (folder / "metrics.jsonl").read_text()
    assert losses(folder) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.dist
def test_the_first_rank_may_be_the_one_that_dies(tmp_path, data, tokenizer):
    folder = tmp_path / "run"
    two = start(make_config(folder, data, tokenizer, ranks=2, steps=400), 2)
    wait_for_step(two, folder, 3)
    check_last_words(kill_rank(two, 0), dead=0, left=1)


def another_text_length(rank, world, folder, data, tokenizer):
    """What each rank is told: by its configuration, and by its first batch."""
    said = []
    for length in (8 + 8 * rank, 8):
        config = make_config(folder, data, tokenizer, ranks=2, text_length=length)
        try:
            train_run = Run(config)
            texts = [{**b, "text": b["text"][:, : 8 - rank]} for b in [next(train_run.loader)]]
            train_run.loader = Texts(texts)
            loop(train_run)
        except ConfigError as error:
            said.append(str(error))
    return said


class Texts(list):
    def report(self):
        return {}

    state_dict = report


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_with_another_text_length_is_an_error_on_all(tmp_path, data, tokenizer):
    found = run(2, another_text_length, str(tmp_path / "run"), str(data), str(tokenizer))
    for by_config, by_batch in found:
        assert "ranks 0 and 1 differ in model.text_length: 8 and 16" in by_config
        assert "ranks disagree on text (L,)" in by_batch
        assert "(8,)" in by_batch
        assert "(7,)" in by_batch


def test_a_batch_size_that_keeps_the_global_batch_is_no_other_setting(
    tmp_path, data, tokenizer, caplog
):
    from siglip2.train.run_dir import open_run, record

    config = make_config(tmp_path / "run", data, tokenizer, ranks=2)
    open_run(config, ranks=2)
    record(config, ranks=2)
    whole = replace(config, train=replace(config.train, batch_size=BATCH))
    open_run(whole, ranks=1)
    assert not caplog.messages
    with pytest.raises(ConfigError, match=r"train.batch_size: 4 -> 8"):
        open_run(whole, ranks=2)
    open_run(config, ranks=1)
    assert "global batch of 8 on 2 ranks and goes on with 4 on 1" in caplog.text
    assert "train.batch_size=8 keeps it" in caplog.text
