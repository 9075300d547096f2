"""What `make gpu` runs: ceilings, GPU tests, compute-sanitizer, then every case beside its rivals.

Results go to bench/results/<gpu>/ as they come.  A run that is cut off goes on where it stopped:
what is finished is recorded there, with a hash of the code, so that other code starts afresh.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from siglip2.errors import ConfigError, Siglip2Error

from . import ceiling, gpu_checks, ops, options, smallest, wheels
from .gpu_cases import DeadDeviceError, Plan, run_cases
from .gpu_state import State
from .machine import Machine, git_commit, results_dir, this_machine

NEEDS_GPU = (
    "make gpu needs a CUDA GPU, and torch finds none here; with one it runs 'pytest -m gpu tests',"
    " then times every op beside its rivals and writes bench/results/<gpu>/."
)
PARTS = ("ceilings", "tests", "sanitizer", "bench")
# Whose benches come first; ops that are not named follow.
PRIORITY = (
    "linear_cross_entropy",
    "sigmoid_loss",
    "varlen_attention",
    "map_pool",
    "patch_embed",
    "posemb_resample",
    "bias_gelu",
    "naflex_tower",
    "ssl_step",
)
SECONDS = 90.0  # of benches, for each op


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a GPU test fails or a tool finds an error, 2 when asked amiss."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print(NEEDS_GPU, file=sys.stderr)
        return 2
    try:
        plan = _plan(args)
        if args.wheels is not None:
            wheels.install(args.wheels, Path(tempfile.mkdtemp(prefix="siglip2-")) / "site")
    except Siglip2Error as error:
        print(f"make gpu: error: {error}", file=sys.stderr)
        return 2
    machine = this_machine("cuda")
    folder = args.out / machine.slug
    state = State.load(folder / ".progress.json", machine, restart=args.restart)
    print(f"{machine.describe()}, Python {machine.python}, commit {git_commit() or 'unknown'}")
    print(wheels.rivals([ops.load(op) for op in plan.ops], machine.device), flush=True)
    for part in plan.parts:
        if part == "bench":
            _bench(plan, state, machine, args.out, argv)
        elif args.only or part not in state.checks:
            _check(part, plan, state, machine, folder / "checks")
    measured = f"{len(state.done)} measurements are in {folder}"
    print(f"{measured}; 'siglip2 bench --readme' shows them")
    failed = [name for name, ok in state.checks.items() if not ok]
    if failed:
        print(f"not right: {', '.join(failed)}; see {folder / 'checks'}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    names = options.names
    p.add_argument("--only", type=names, help=f"of {','.join(PARTS)} (default: all, in turn)")
    p.add_argument("--ops", type=names, help="whose kernels and benches, comma-separated")
    p.add_argument("--modes", type=names, help="of the benches (default: each case's own)")
    p.add_argument("--skip", type=names, help="rivals left out of the benches, comma-separated")
    p.add_argument(
        "--seconds", type=float, default=SECONDS, help="of benches, for each op (default: 90)"
    )
    p.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of rivals to install first")
    p.add_argument("--out", type=Path, default=results_dir(), help="default: %(default)s")
    p.add_argument("--restart", action="store_true", help="forget what an earlier run did")
    return p


def _plan(args: argparse.Namespace) -> Plan:
    if args.seconds <= 0:
        raise ConfigError(f"need --seconds above 0; got {args.seconds:g}")
    cases = options.chosen_ops(args.ops or ops.names())
    return Plan(
        parts=options.known("part", args.only or PARTS, PARTS),
        ops=args.ops or sorted(cases, key=lambda op: PRIORITY.index(op) if op in PRIORITY else 99),
        modes=options.chosen_modes(args.modes),
        skip=options.chosen_providers(args.skip, cases.values()) or [],
        seconds=args.seconds,
    )


def _bench(plan: Plan, state: State, machine: Machine, out: Path, argv: Sequence[str]) -> None:
    try:
        run_cases(plan, state, machine, out)
    except DeadDeviceError as error:
        print(f"{error}; going on in a new process without it", file=sys.stderr, flush=True)
        again = [word for word in argv if word != "--restart"]
        command = [sys.executable, "-P", "-m", "siglip2_bench.gpu", *again, "--only", "bench"]
        os.execv(sys.executable, command)


def _check(part: str, plan: Plan, state: State, machine: Machine, folder: Path) -> None:
    """Runs a part that is no bench, and writes <folder>/<part>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{part} ...", flush=True)
    if part == "ceilings":
        record = {"ok": True, **ceiling.measure(machine.device)}
    elif part == "tests":
        record = gpu_checks.run_tests(folder)
    else:
        record = gpu_checks.run_sanitizer([op for op in smallest.names() if op in plan.ops])
    about = {"machine": machine.to_json(), "commit": git_commit()}
    record |= about | {"timestamp": time.strftime("%Y-%m-%d %H:%M:%S")}
    partial = folder / f"{part}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, folder / f"{part}.json")
    print("\n".join(gpu_checks.summary(part, record)), flush=True)
    state.checks[part] = record["ok"]
    state.write()


if __name__ == "__main__":
    sys.exit(main())
