"""Where numbers go.

metrics.jsonl always, the console, and TensorBoard, wandb or trackio when asked.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import write_atomic


class JsonLines:
    """metrics.jsonl: one object a line.

    Continuing a run drops lines after its checkpoint and a torn last line.
    """

    def __init__(self, path: Path, *, from_step: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = _parse(line)
                if row is not None and row["step"] <= from_step:
                    kept.append(line)
        write_atomic(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


class Reporter:
    """Scalars to the trackers named in `train.report_to`."""

    def __init__(self, names: Sequence[str], run_dir: Path, config: dict[str, Any]):
        self._tensorboard = None
        self._trackers = []
        for name in names:
            if name == "tensorboard":
                require("tensorboard", "log")
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(run_dir / "tb")
            else:
                tracker = require(name, "log")
                tracker.init(project="siglip2", name=run_dir.name, config=config)
                self._trackers.append(tracker)

    def write(self, row: dict[str, Any]) -> None:
        scalars = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(scalars, step=row["step"])
        if self._tensorboard:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, row["step"])

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        for tracker in self._trackers:
            tracker.finish()


def console_line(row: dict[str, Any], num_steps: int, eta_s: float) -> str:
    """The one line a person reads at each interval."""
    terms = " ".join(
        f"{key[6:-5]} {row[key]:.4f}"
        for key in row
        if key.startswith("train/") and key.endswith("_loss")
    )
    memory = (
        f" | mem {row['mem/max_reserved_gib']:.1f} GiB" if "mem/max_reserved_gib" in row else ""
    )
    packed = ""
    if "data/fill" in row:
        packed = (
            f" | {row['data/tokens']:.0f} patches, fill {100 * row['data/fill']:.0f}%"
            f" balance {row['data/balance']:.2f}"
        )
    return (
        f"step {row['step']}/{num_steps} ({100 * row['step'] / num_steps:.1f}%) eta {_clock(eta_s)}"
        f" | loss {row['train/loss']:.4f} ({terms})"
        f" | t {row['train/logit_scale']:.1f} b {row['train/logit_bias']:.2f}"
        f" | lr {row['train/lr']:.1e} gnorm {row['train/grad_norm']:.2f}"
        f" | {row['perf/samples_per_second']:.0f} img/s"
        f" data {row['perf/data_time_pct']:.0f}%{packed}{memory}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """A bar on a terminal; plain lines elsewhere. The lines are printed in both."""

    def __init__(self, total: int, done: int, *, enabled: bool):
        self._bar = None
        self._enabled = enabled
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, transient=True)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self) -> None:
        if self._bar:
            self._bar.advance(self._task)

    def line(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
