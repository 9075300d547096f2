"""`siglip2 bench`: our ops beside their rivals, as tables and files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from siglip2.errors import Siglip2Error

from . import host_patchify, options, readme
from .case import Case
from .machine import ROOT, Machine, results_dir, this_machine
from .plot import save_plot
from .progress import Progress
from .report import compare, console, markdown
from .result import Result, csv_rows, read_csv, read_json, write_csv, write_json
from .runner import Request, run_case

HOST = "host_patchify"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when what was asked for cannot be done.

    A rival that is absent, wrong or fails is a line of the table, not an error.
    """
    args = options.parser().parse_args(argv)
    try:
        return _run(args)
    except Siglip2Error as error:
        print(f"siglip2 bench: error: {error}", file=sys.stderr)
        return 2


def save(result: Result, out: Path) -> Path:
    """Merges a result into out/<machine>/<op>.json; rewrites the CSV, Markdown and plot there."""
    path = out / result.machine.slug / f"{result.op}.json"
    write_json(path, result)
    merged = read_json(path)
    write_csv(path.with_suffix(".csv"), csv_rows(merged))
    path.with_suffix(".md").write_text(markdown(merged))
    save_plot(path.with_suffix(".png"), merged)
    return path


def _run(args: argparse.Namespace) -> int:
    if args.readme and not args.ops:
        return _write_readme(args.out)
    if HOST in args.ops:
        args.ops.remove(HOST)
        status = _run_host(args)
        if status or not args.ops:
            return status
    cases = options.chosen_ops(args.ops)
    device = options.chosen_device(args.device)
    if args.list:
        print(_listing(cases, device))
        return 0
    saved = read_csv(args.compare) if args.compare else None
    progress = Progress()
    requests = _requests(args, cases, device, progress)
    # CPU times are no results, so they are written only where the caller says.
    out = args.out or (results_dir() if device == "cuda" else None)
    results = []
    for request in requests:
        result = run_case(request)
        progress.clear()
        print(console(result), end="\n\n")
        if out is not None:
            print(f"wrote {save(result, out)}")
        results.append(result)
    if args.save:
        lines = [
            line for r, q in zip(results, requests, strict=True) for line in csv_rows(r, q.metrics)
        ]
        write_csv(args.save, lines)
    if saved is not None:
        print(compare(results, saved, str(args.compare)))
    return _write_readme(args.out) if args.readme else 0


def _run_host(args: argparse.Namespace) -> int:
    """The host's work has no tensors to differentiate and no GPU: a script of its own."""
    if args.list:
        print(f"{HOST}\n  pictures to packed patches on one CPU core, and the whole loader")
        return 0
    json = [] if args.out is None else ["--json", str(args.out / f"{HOST}.json")]
    return host_patchify.main(["--loader", *json])


def _requests(
    args: argparse.Namespace, cases: dict[str, Case], device: str, say: Progress
) -> list[Request]:
    """Every option checked, before the first measurement."""
    machine: Machine = this_machine(device)
    providers = options.chosen_providers(args.providers, cases.values())
    modes, metrics = options.chosen_modes(args.modes), options.chosen_metrics(args.metric, device)
    reps = options.check_reps(args.reps)
    return [
        Request(
            op=op,
            case=case,
            machine=machine,
            dtype=args.dtype or ("bf16" if device == "cuda" else "fp32"),
            shapes=options.chosen_shapes(op, case, args.sweep, device),
            modes=modes or case.modes,
            providers=providers and [name for name in providers if name in case.rivals],
            metrics=metrics,
            reps=reps,
            say=say,
        )
        for op, case in cases.items()
    ]


def _write_readme(out: Path | None) -> int:
    readme.update(ROOT / "README.md", out or results_dir())
    print(f"wrote the table between {readme.BEGIN} and {readme.END} of {ROOT / 'README.md'}")
    return 0


def _listing(cases: dict[str, Case], device: str) -> str:
    lines = []
    for op, case in cases.items():
        lines.append(op)
        sizes = [" ".join(f"{k}={v}" for k, v in shape.items()) for shape in case.shapes]
        lines.append(f"  shapes: {sizes[0]} (trial run), {', '.join(sizes[1:])}")
        for name, rival in case.rivals.items():
            reason = rival.unsupported(device)
            lines.append(f"  {name:18} {f'skipped: {reason}' if reason else 'runs here'}")
    return "\n".join(lines)
