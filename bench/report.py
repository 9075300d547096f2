"""Rows for people: console and Markdown tables, geometric means, comparison with a saved CSV."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .result import Result, Row, csv_rows

COLUMNS = (
    "shape",
    "rival",
    "ms",
    "p20-p80",
    "TFLOP/s",
    "of GEMM",
    "GB/s",
    "roofline",
    "peak MiB",
    "workspace",
    "speed-up",
    "error",
)
_NUMERIC_FROM = 2  # columns from here on are right-aligned
_KEY = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "x_name",
    "x_value",
    "extra_benchmark_config_str",
)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header, and cells of each row; a rival without times says why in place of them."""
    regimes = list(dict.fromkeys(label for row in rows for label in row.grad_errors))
    header = [*COLUMNS, *(f"grad error, {label}" for label in regimes)]
    return header, [[_shape(row), row.provider, *_cells(row, regimes)] for row in rows]


def console(result: Result) -> str:
    """One aligned table for each mode and dtype, its machine above it and mean speed-ups below."""
    blocks = [f"{result.op} on {result.machine.describe()}"]
    if result.machine.device == "cpu":
        blocks.append(
            "CPU: these times show that the harness runs; they say nothing about GPU kernels."
        )
    for (mode, dtype), rows in _grouped(result.rows):
        header, cells = table(rows)
        lines = _aligned([header, *cells])
        means = "\n".join(f"  {line}" for line in [*_ceiling(rows), *mean_speedups(result, rows)])
        blocks.append("\n".join([f"{mode}, {dtype}", *lines]) + (f"\n{means}" if means else ""))
    return "\n\n".join(blocks)


def markdown(result: Result) -> str:
    """The same tables for a Markdown file."""
    blocks = [f"## {result.op}", f"{result.machine.describe()}, {_commits(result.rows)}."]
    for (mode, dtype), rows in _grouped(result.rows):
        blocks.append(f"{mode}, {dtype}:")
        blocks.append("\n".join(markdown_table(*table(rows))))
        blocks += [*_ceiling(rows), *mean_speedups(result, rows)]
    return "\n\n".join(blocks) + "\n"


def _ceiling(rows: Sequence[Row]) -> list[str]:
    rates = [row.gemm_tflops for row in rows if row.gemm_tflops is not None]
    if not rates:
        return []
    return [f"GEMM, one large matrix product in turn: {min(rates):.3g}-{max(rates):.3g} TFLOP/s"]


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---:" if i >= _NUMERIC_FROM else "---" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def mean_speedups(result: Result, rows: Sequence[Row]) -> list[str]:
    """A line for each of our providers: geometric mean over the shapes both it and a rival ran."""
    lines = []
    times = {(r.provider, _shape(r)): r.time_ms.p50 for r in rows if r.time_ms}
    names = list(dict.fromkeys(r.provider for r in rows))
    for ours in (name for name in names if name in result.ours):
        parts = []
        for rival in (name for name in names if name not in result.ours):
            pairs = [
                (times[rival, s], t)
                for (n, s), t in times.items()
                if n == ours and (rival, s) in times
            ]
            if pairs:
                mean = geometric_mean(theirs / own for theirs, own in pairs)
                parts.append(f"{mean:.2f}x {rival} ({len(pairs)} shape{'s' * (len(pairs) > 1)})")
        if parts:
            lines.append(f"{ours}, geometric mean of speed-ups: {', '.join(parts)}")
    return lines


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def compare(results: Iterable[Result], saved: Sequence[dict[str, str]], source: str) -> str:
    """Medians now and in a saved CSV. Lines of another GPU or CPU are not compared, and counted."""
    now = [line for result in results for line in csv_rows(result)]
    machines = {line["gpu_name"] for line in now}
    then = {_csv_key(line): line for line in saved if line["gpu_name"] in machines}
    lines = [["op", "rival", "mode", "metric", "at", "then", "now", "now / then"]]
    for line in now:
        earlier = then.get(_csv_key(line))
        if earlier is None:
            continue
        old, new = float(earlier["y_value_50"]), float(line["y_value_50"])
        lines.append(
            [str(line[k]) for k in _KEY[:4]]
            + [f"{line['x_name']}={line['x_value']}", _figure(old), _figure(new)]
            + [f"{new / old:.3f}" if old else "-"]
        )
    others = sum(line["gpu_name"] not in machines for line in saved)
    were = "line of {} was" if others == 1 else "lines of {} were"
    note = f"\n{others} {were.format(source)} measured on another machine." if others else ""
    if len(lines) == 1:
        return f"Nothing in {source} matches what was measured here.{note}"
    title = f"Compared with {source} (medians in ms or MB, errors relative):"
    return "\n".join([title, *_aligned(lines)]) + note


def _figure(value: float) -> str:
    return f"{value:.3f}" if value >= 0.05 or value == 0 else f"{value:.2e}"


def _csv_key(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(line[name]) for name in _KEY)


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    key = lambda row: (row.mode, row.dtype)
    order = list(dict.fromkeys(map(key, rows)))
    for group, members in groupby(sorted(rows, key=lambda r: order.index(key(r))), key=key):
        yield group, list(members)


def _cells(row: Row, regimes: Sequence[str]) -> list[str]:
    if row.time_ms is None:
        reason = f"{row.status} ({row.detail})" if row.status == "wrong" else row.status
        detail = f": {row.detail}" if row.detail and row.status != "wrong" else ""
        return [reason + detail, *[""] * (len(COLUMNS) - 3 + len(regimes))]
    q = row.time_ms
    return [
        f"{q.p50:.3f}",
        f"{q.p20:.3f}-{q.p80:.3f}",
        _number(row.tflops, ".1f"),
        _number(row.gemm_share, ".0%"),
        _number(row.gbytes_per_s, ".0f"),
        _number(row.roofline, ".0%"),
        _number(row.peak_mib, ".0f"),
        _number(row.workspace_mib, ".0f"),
        _number(row.speedup, ".2f", "x"),
        _number(row.error, ".2f"),
        *(_number(row.grad_errors.get(label), ".2e") for label in regimes),
    ]


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    # A sentence in place of numbers must not widen its column.
    measured = [cells for cells in lines if len(cells) < 4 or cells[3]]
    widths = [max(len(cells[i]) for cells in measured or lines) for i in range(len(lines[0]))]
    for i in range(_NUMERIC_FROM):
        widths[i] = max(len(cells[i]) for cells in lines)
    aligned = []
    for cells in lines:
        is_measured = len(cells) < 4 or bool(cells[3])
        padded = [
            cell.rjust(width) if i >= _NUMERIC_FROM and is_measured else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        aligned.append("  ".join(padded).rstrip())
    return aligned


def _shape(row: Row) -> str:
    return " ".join(f"{name}={size}" for name, size in row.shape.items())


def _commits(rows: Sequence[Row]) -> str:
    commits = sorted({row.commit for row in rows if row.commit})
    return f"commit {', '.join(commits)}" if commits else "no commit recorded"
