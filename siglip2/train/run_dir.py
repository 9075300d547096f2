"""The folder of a run.

What it holds, whether it may be continued, and files that are never half written.
"""

import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import Config
from ..errors import ConfigError
from ..files import write_atomic
from .checkpoint import checkpoints

log = logging.getLogger("siglip2")

# A resumed run may change these: they do not alter what is computed.
FREE_TO_CHANGE = [
    "train.output_dir",
    "train.resume",
    "train.overwrite",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.eval_every_steps",
    "train.report_to",
    "train.accum_steps",
    "train.on_nonfinite",
    "optim.name",
    "ssl.pack",
    "dist.strategy",
    "dist.loss",
    "dist.check_shapes",
    "dist.timeout_s",
    "data.val",
    "data.cache_images",
]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys. A dictionary of sources is one value."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != "data.val":
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_yaml(config: Config) -> str:
    import yaml

    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def open_run(config: Config, *, ranks: int = 1) -> Path | None:
    """Make the run's folder ready; return the checkpoint to continue from, if any.

    It continues on another number of `ranks` too; a batch size that keeps the global batch is then
    no other setting. Raises ConfigError when the folder holds something else, or a run with other
    settings.
    """
    folder = Path(config.train.output_dir)
    if config.train.overwrite and folder.exists():
        if not (folder / "config.yaml").is_file() and any(folder.iterdir()):
            raise ConfigError(f"train.overwrite: {folder} is no run's folder, so it is left alone")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    resume = config.train.resume
    if resume not in ("auto", "never"):
        return _explicit(Path(resume))
    found = checkpoints(folder / "checkpoints")
    if resume == "never" and (found or (folder / "config.yaml").exists()):
        raise ConfigError(
            f"{folder} already holds a run: pass train.resume=auto to continue it,"
            " train.overwrite=true to delete it, or another train.output_dir"
        )
    if (folder / "config.yaml").exists():
        _check_same(folder, config, ranks)
    elif any(p.name != "log.txt" for p in folder.iterdir()):
        raise ConfigError(
            f"train.output_dir {folder} is not empty and holds no run: choose another folder"
        )
    return found[-1] if found else None


def record(config: Config, *, ranks: int = 1) -> None:
    """Write config.yaml (re-runnable) and env.json."""
    folder = Path(config.train.output_dir)
    write_atomic(folder / "config.yaml", to_yaml(config))
    write_atomic(folder / "env.json", json.dumps({**environment(), "ranks": ranks}, indent=1))


def check_one_config(texts: list[str]) -> None:
    """Raises ConfigError, on every rank alike, when ranks were started with other settings.

    `texts` are all ranks' configurations as YAML, in rank order.
    """
    import yaml

    first, *others = (flatten(yaml.safe_load(text)) for text in texts)
    for rank, other in enumerate(others, 1):
        found = [
            f"{key}: {first[key]!r} and {other[key]!r}" for key in first if first[key] != other[key]
        ]
        if found:
            raise ConfigError(
                f"need one configuration on all ranks; ranks 0 and {rank} differ in"
                f" {'; '.join(found[:5])}. Start every node with the same command"
            )


def environment() -> dict[str, Any]:
    """Versions and hardware a result should be read with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "siglip2": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _explicit(path: Path) -> Path:
    if (path / "meta.json").is_file():
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise ConfigError(
            "train.resume: need 'auto', 'never', a checkpoint or a run's folder;"
            f" {path} has no checkpoint"
        )
    return found[-1]


def _check_same(folder: Path, config: Config, ranks: int) -> None:
    import yaml

    new, default = (flatten(yaml.safe_load(to_yaml(x))) for x in (config, Config()))
    old = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    old = default | old  # fields are new whose default is what an older version did
    env = folder / "env.json"
    old_ranks = json.loads(env.read_text()).get("ranks", 1) if env.exists() else 1
    old_batch, new_batch = (
        flat.get("train.batch_size", 0) * n for flat, n in ((old, old_ranks), (new, ranks))
    )
    if old_batch == new_batch:
        old["train.batch_size"] = new["train.batch_size"]
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(new)
        if old.get(key) != new.get(key)
        and key not in FREE_TO_CHANGE
        and not key.startswith("eval.")
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:5])}):"
            " use the same to continue it, train.overwrite=true to start again,"
            " or another train.output_dir"
        )
    if old_batch != new_batch:
        log.warning(
            "%s had a global batch of %d on %d ranks and goes on with %d on %d;"
            " train.batch_size=%d keeps it",
            folder,
            *(old_batch, old_ranks, new_batch, ranks, max(old_batch // ranks, 1)),
        )
