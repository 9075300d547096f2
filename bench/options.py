"""What `siglip2 bench` is asked for, checked before anything runs."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from siglip2.errors import ConfigError

from . import ops
from .case import MODES, Case, Shape
from .runner import DTYPES

METRICS = ("speed", "memory")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="siglip2 bench",
        description="Times our ops beside their rivals, once each one's results are checked.",
    )
    p.add_argument("ops", nargs="*", metavar="op", help="which ops (default: all; see --list)")
    p.add_argument("--providers", type=names, help="rivals, comma-separated (default: all)")
    p.add_argument(
        "--sweep",
        metavar="DIM=SIZES",
        help="B=4096:65536 (doubling) or B=4096,6000: sizes to measure",
    )
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument(
        "--modes",
        type=names,
        help=f"of {','.join(MODES)} (default: forward,full; forward,backward for attention)",
    )
    p.add_argument("--metric", type=names, help=f"of {','.join(METRICS)} (default: both)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    p.add_argument("--reps", type=int, help="calls timed for each rival (default: 5 to 100)")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: bench/results)"
    )
    p.add_argument("--save", type=Path, metavar="FILE.csv", help="also write this run's medians")
    p.add_argument("--compare", type=Path, metavar="FILE.csv", help="set medians beside saved ones")
    p.add_argument("--readme", action="store_true", help="rewrite the README's table from results")
    p.add_argument("--list", action="store_true", help="ops, their shapes and who can run here")
    return p


def chosen_ops(asked: Sequence[str]) -> dict[str, Case]:
    """The cases of the named ops, of all without names; ConfigError for an unknown one."""
    every = ops.names()
    return {name: ops.load(name) for name in known("op", asked, every) or every}


def chosen_providers(asked: Sequence[str] | None, cases: Iterable[Case]) -> list[str] | None:
    every = list(dict.fromkeys(name for case in cases for name in case.rivals))
    return known("provider", asked, every) if asked else None


def chosen_modes(asked: Sequence[str] | None) -> list[str] | None:
    """None leaves it to each case."""
    return known("mode", asked, MODES) if asked else None


def chosen_metrics(asked: Sequence[str] | None, device: str) -> list[str]:
    metrics = known("metric", asked, METRICS) if asked else list(METRICS)
    if device == "cpu" and metrics == ["memory"]:
        raise ConfigError("peak memory is measured on a CUDA device only; use --metric speed here")
    return metrics


def chosen_device(asked: str | None) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("needs a CUDA device; torch finds none. --device cpu makes a trial run")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def chosen_shapes(op: str, case: Case, sweep: str | None, device: str) -> list[Shape]:
    """The case's own shapes (on a CPU the smoke shape), or its first, swept along a dimension."""
    own = [case.shapes[0]] if device == "cpu" else list(case.shapes[1:])
    if sweep is None:
        return own
    name, sizes = _parse_sweep(sweep)
    if name not in own[0]:
        raise ConfigError(f"need a dimension of {op} ({', '.join(own[0])}) to sweep; got {name!r}")
    return [{**own[0], name: size} for size in sizes]


def check_reps(reps: int | None) -> int | None:
    if reps is not None and reps < 1:
        raise ConfigError(f"need --reps of at least 1; got {reps}")
    return reps


def _parse_sweep(text: str) -> tuple[str, list[int]]:
    found = re.fullmatch(r"(\w+)=(?:(\d+):(\d+)|(\d+(?:,\d+)*))", text)
    if not found:
        raise ConfigError(f"need --sweep DIM=LOW:HIGH or DIM=SIZE,SIZE,...; got {text!r}")
    name, low, high, listed = found.groups()
    sizes = [int(size) for size in listed.split(",")] if listed else _doubled(int(low), int(high))
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"need --sweep sizes of at least 1, the low one first; got {text!r}")
    return name, sizes


def _doubled(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low, ... up to high; `low` of 0 would never end."""
    if low < 1:
        return []
    return [low << n for n in range((high // low).bit_length())]


def known(what: str, asked: Sequence[str], every: Sequence[str]) -> list[str]:
    """`asked` without repeats; ConfigError that names the nearest of `every` for another name."""
    for name in asked:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigError(f"unknown {what} {name!r}; {hint}there is {', '.join(every)}")
    return list(dict.fromkeys(asked))
