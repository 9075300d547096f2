"""What `make gpu` runs: the GPU tests, then every case beside its rivals.

Results go to bench/results/<gpu>/.  A run that is cut off goes on where it stopped: each finished
(op, shape, dtype) is recorded there, with a hash of the code, so that other code starts afresh.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import ops
from .case import Shape
from .cli import save
from .machine import ROOT, Machine, results_dir, source_digest, this_machine
from .progress import Progress
from .report import console
from .runner import DTYPES, Request, check_rivals, run_case

NEEDS_GPU = (
    "make gpu needs a CUDA GPU, and torch finds none here; with one it runs 'pytest -m gpu tests',"
    " then times every op beside its rivals and writes bench/results/<gpu>/."
)
NO_TESTS_COLLECTED = 5  # pytest's exit status


@dataclass
class State:
    """What is done, in <results>/<gpu>/.progress.json."""

    path: Path
    code: list[str]  # digest of the sources, then the software of the machine
    tests_passed: bool = False
    done: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, machine: Machine) -> "State":
        """The recorded state; an empty one where there is none or it belongs to other code."""
        fresh = cls(path, [source_digest(), *machine.software])
        if not path.exists():
            return fresh
        raw = json.loads(path.read_text())
        if raw["code"] != fresh.code:
            return fresh
        return replace(fresh, tests_passed=raw["tests_passed"], done=raw["done"])

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        raw = {"code": self.code, "tests_passed": self.tests_passed, "done": self.done}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(raw, indent=1) + "\n")
        partial.replace(self.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a GPU test fails (nothing is timed then), 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=results_dir(), help="default: %(default)s")
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run did")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NEEDS_GPU, file=sys.stderr)
        return 2
    machine = this_machine("cuda")
    path = args.out / machine.slug / ".progress.json"
    if args.restart:
        path.unlink(missing_ok=True)
    state = State.load(path, machine)
    if not state.tests_passed:
        if not run_tests():
            print("The GPU tests fail, so nothing was timed.", file=sys.stderr)
            return 1
        state.tests_passed = True
        state.write()
    run_cases(state, machine, args.out)
    print(
        f"{len(state.done)} measurements are in {path.parent}; 'siglip2 bench --readme' shows them"
    )
    return 0


def run_tests() -> bool:
    """`pytest -m gpu tests`. -P keeps the checkout off sys.path, where kernels/ hides a package."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "tests"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    return status in (0, NO_TESTS_COLLECTED)


def run_cases(state: State, machine: Machine, out: Path) -> None:
    """Every case, dtype and shape that `state` lacks; it is written after each."""
    for op in ops.names():
        case = ops.load(op)
        for dtype in (name for name, torch_dtype in DTYPES.items() if torch_dtype in case.dtypes):
            shapes = case.shapes if machine.device == "cpu" else case.shapes[1:]
            todo = [shape for shape in shapes if _key(op, shape, dtype) not in state.done]
            if not todo:
                continue
            request = Request(
                op=op,
                case=case,
                machine=machine,
                dtype=dtype,
                shapes=todo,
                modes=case.modes,
                say=Progress(),
            )
            verdicts = check_rivals(request)
            for shape in todo:
                result = run_case(replace(request, shapes=[shape]), verdicts)
                print(console(result), end="\n\n", flush=True)
                save(result, out)
                state.done.append(_key(op, shape, dtype))
                state.write()


def _key(op: str, shape: Shape, dtype: str) -> str:
    return " ".join([op, dtype, *(f"{name}={size}" for name, size in shape.items())])


if __name__ == "__main__":
    sys.exit(main())
