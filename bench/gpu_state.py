"""What a run of `make gpu` has done, so that the next one goes on from there."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from .case import Shape
from .machine import Machine, source_digest


@dataclass
class State:
    """What is done, in <results>/<gpu>/.progress.json."""

    path: Path
    code: list[str]  # digest of the sources, then the software of the machine
    checks: dict[str, bool] = field(default_factory=dict)  # name -> whether all was right
    done: list[str] = field(default_factory=list)
    # op -> rival -> the error with which it ended CUDA
    broken: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, machine: Machine, *, restart: bool = False) -> "State":
        """The recorded state; an empty one where there is none or it belongs to other code."""
        fresh = cls(path, [source_digest(), *machine.software])
        if restart or not path.exists():
            return fresh
        raw = json.loads(path.read_text())
        if raw.pop("code") != fresh.code:
            return fresh
        return replace(fresh, **raw)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        raw = {k: getattr(self, k) for k in ("code", "checks", "done", "broken")}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(raw, indent=1) + "\n")
        partial.replace(self.path)


def key(op: str, shape: Shape, dtype: str) -> str:
    return " ".join([op, dtype, *(f"{name}={size}" for name, size in shape.items())])
