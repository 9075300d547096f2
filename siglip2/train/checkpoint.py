"""Checkpoints through torch.distributed.checkpoint.

Written beside, then renamed; the last k are kept.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..errors import CheckpointError

META = "meta.json"


class Progress(NamedTuple):
    """What a run must know to go on, besides weights and optimiser state."""

    step: int
    examples: int
    loader: dict[str, Any]
    time_s: float  # spent training
    has_stage: bool = False  # of self-distillation: heads, teacher and centres are in there


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(p for p in found if (p / META).is_file())


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    keep: int,
) -> Path:
    """Write `folder/step_N` and delete all but the last `keep`.

    Raises CheckpointError when it cannot be written; what was saved before stays as it was.
    """
    final = folder / f"step_{progress.step:09d}"
    beside = folder / f".{final.name}.partial"
    if (final / META).is_file():  # a finished run that was started again
        return final
    model_state, optimizer_state = get_state_dict(model, optimizer)
    try:
        if is_main():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        _barrier()
        with _one_process_is_fine():
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state},
                checkpoint_id=beside,
                no_dist=not dist.is_initialized(),
            )
        if is_main():
            (beside / META).write_text(json.dumps(progress._asdict(), indent=1))
            beside.rename(final)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        shutil.rmtree(beside, ignore_errors=True)
        older = checkpoints(folder)
        last = f"the last complete one is {older[-1]}" if older else "there is none before it"
        raise CheckpointError(
            f"could not write checkpoint {final}: {_first_line(error)}; {last}."
            " Free space or fix the folder's rights, then start the same command again: it resumes"
        ) from error
    if is_main():
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return final


def read_progress(path: Path) -> Progress:
    """What a checkpoint says of itself.

    Raises CheckpointError when `path` is no checkpoint or is damaged.
    """
    if not (path / META).is_file():
        raise CheckpointError(f"need a checkpoint folder with {META}; got {path}")
    try:
        return Progress(**json.loads((path / META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Read weights and optimiser state in place, on any number of ranks.

    Raises CheckpointError when `path` is no checkpoint, is damaged, or is of another model.
    """
    progress = read_progress(path)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    try:
        with _one_process_is_fine():
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        dcp.CheckpointException,
    ) as error:
        raise _unreadable(path, error) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return progress


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silences dcp's remark that no process group exists: one process is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"cannot read checkpoint {path}: {_first_line(error)}. Delete it to resume from the"
        " one before, or pass train.resume=never"
    )


def _first_line(error: BaseException) -> str:
    inner = getattr(error, "failures", None)
    if inner:  # dcp wraps what each rank met
        wrapped = next(iter(inner.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
