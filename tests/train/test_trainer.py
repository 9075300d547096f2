"""Whole runs on the default data: killed and resumed, on several ranks, refused, and exported."""

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
import yaml

from siglip2.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    QuickstartConfig,
    TrainConfig,
)
from siglip2.errors import CheckpointError, ConfigError
from siglip2.train.checkpoint import checkpoints
from siglip2.train.run_dir import open_run, record, to_yaml
from siglip2.train.trainer import Run, loop, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def make_config(folder, cache, *, steps=8, val=None, **changes) -> Config:
    settings = {
        "output_dir": str(folder),
        "examples": 16 * steps,
        "batch_size": 16,
        "precision": "fp32",
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
    }
    return Config(
        model=ModelConfig(name="siglip2-tiny-patch8-32", text_length=8, init_bias=-4.0),
        data=DataConfig(
            val=val,
            captions_per_image=2,
            workers=0,
            cache_images=True,
            quickstart=QuickstartConfig(concepts=24, cache_dir=cache),
        ),
        optim=OptimConfig(warmup_examples=32),
        train=TrainConfig(**settings | changes),
        eval=EvalConfig(max_images=64),
    )


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def computed(folder) -> list[dict]:
    """The part of each line that does not depend on the clock."""
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/") and k != "time_s"}
        for row in rows(folder)
    ]


def weights(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "export" / "model.safetensors")


def start(config: Config, path: Path) -> subprocess.Popen:
    path.write_text(to_yaml(config))
    code = "import sys; from siglip2.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--config", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def kill_after(process: subprocess.Popen, folder: Path, step: int) -> None:
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()


@pytest.mark.slow
def test_a_run_killed_twice_ends_like_one_that_was_not(tmp_path, cache):
    whole = start(make_config(tmp_path / "whole", cache), tmp_path / "whole.yaml")
    assert whole.wait() == 0, whole.stdout.read()
    config, path = make_config(tmp_path / "killed", cache), tmp_path / "killed.yaml"
    for step in (3, 5):  # between two checkpoints, and close to one
        process = start(config, path)
        kill_after(process, tmp_path / "killed", step)
        assert process.returncode == -signal.SIGKILL, process.stdout.read()
    last = start(config, path)
    assert last.wait() == 0, last.stdout.read()
    assert "continuing" in last.stdout.read()
    assert computed(tmp_path / "killed") == computed(tmp_path / "whole")
    one, other = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("finished") / "run"
    val = {"seen": "quickstart:train", "held_out": "quickstart:heldout"}
    return train(make_config(folder, cache, val=val))


def test_a_run_leaves_all_its_files(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "eval.json", "report.html"} <= names
    assert [row["step"] for row in rows(finished)] == list(range(1, 9))
    assert [p.name for p in checkpoints(finished / "checkpoints")] == [
        "step_000000006",
        "step_000000008",
    ]
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["train"]["examples"] == 128
    metrics = json.loads((finished / "eval.json").read_text())["metrics"]
    assert "val/held_out/openmoji/mean/i2t_r1" in metrics


def test_the_export_gives_transformers_the_same_embeddings(finished):
    transformers = pytest.importorskip("transformers")
    import siglip2

    ours = siglip2.from_pretrained(finished / "export")
    theirs = transformers.AutoModel.from_pretrained(finished / "export")
    tokenizer = siglip2.get_tokenizer(finished / "export", text_length=8)
    image, text = torch.rand(3, 3, 32, 32) * 2 - 1, tokenizer(["a cat", "кошка", "猫"])
    with torch.no_grad():
        out = theirs(pixel_values=image, input_ids=text)
        torch.testing.assert_close(ours.encode_image(image, normalize=True), out.image_embeds)
        torch.testing.assert_close(ours.encode_text(text, normalize=True), out.text_embeds)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "export")
    theirs_ids = their_tokenizer(
        ["a CAT", "кошка"], padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    assert torch.equal(theirs_ids.input_ids, tokenizer(["a CAT", "кошка"]))


def test_a_finished_run_does_not_train_again(finished, cache, capsys):
    before = computed(finished)
    val = {"seen": "quickstart:train", "held_out": "quickstart:heldout"}
    train(make_config(finished, cache, val=val))
    assert computed(finished) == before


def test_other_settings_are_refused_by_name(finished, cache):
    config = make_config(finished, cache, batch_size=8)
    with pytest.raises(
        ConfigError, match=r"other settings \(.*train.batch_size: 16 -> 8.*overwrite"
    ):
        train(config)


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path, cache):
    """What it did not know it did as the defaults do, and other values are other settings."""
    config = make_config(tmp_path, cache)
    record(config)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del saved["ssl"]["photometric"], saved["train"]["seed"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert open_run(config) is None  # there is no checkpoint yet
    other = replace(config, ssl=replace(config.ssl, photometric=False))
    with pytest.raises(ConfigError, match=r"other settings \(ssl.photometric: True -> False\)"):
        open_run(other)


def test_resume_never_refuses_a_run(finished, cache):
    with pytest.raises(ConfigError, match="already holds a run"):
        train(make_config(finished, cache, resume="never"))


def test_a_folder_with_other_things_is_left_alone(tmp_path, cache):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        train(make_config(tmp_path, cache))
    with pytest.raises(ConfigError, match="is no run's folder, so it is left alone"):
        train(make_config(tmp_path, cache, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_tensorboard_gets_the_scalars(tmp_path, cache):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop(Run(make_config(tmp_path / "run", cache, steps=3, report_to=("tensorboard",))))
    events = event_file.EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([row["train/loss"] for row in rows(tmp_path / "run")])


def test_bf16_activations_train(tmp_path, cache):
    run = Run(make_config(tmp_path / "run", cache, steps=3, precision="bf16"))
    loop(run)
    assert run.model.encode_text(torch.ones(1, 8).long()).dtype == torch.bfloat16
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    exact = Run(make_config(tmp_path / "exact", cache, steps=3))
    loop(exact)
    # bfloat16 keeps 8 bits: the losses are near, and not the same numbers.
    for one, other in zip(rows(tmp_path / "run"), rows(tmp_path / "exact"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=2**-5)
        assert one["train/loss"] != other["train/loss"]


def test_a_damaged_checkpoint_says_what_to_do(tmp_path, cache):
    run = Run(make_config(tmp_path / "run", cache, steps=2))
    loop(run)
    run.save()
    (last,) = checkpoints(tmp_path / "run" / "checkpoints")
    part = next(last.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match=r"cannot read checkpoint .*step_000000002.*Delete it"
    ):
        Run(make_config(tmp_path / "run", cache, steps=2))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, cache):
    import resource

    run = Run(make_config(tmp_path / "run", cache, steps=4))
    loop(run)
    run.save()
    run.progress = run.progress._replace(step=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes a file may grow to
    try:
        with pytest.raises(
            CheckpointError, match=r"could not write.*last complete one is .*step_000000004"
        ):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_000000004"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
