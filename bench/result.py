"""A measured row, and the files rows live in: JSON of our own, CSV in Liger-Kernel's columns."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from siglip2.errors import DataError

from .machine import Machine
from .timing import Quantiles

Status = Literal["ok", "wrong", "skipped", "failed", "out of memory"]

# Liger-Kernel's benchmark CSV, with our version in its last column.
CSV_COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "siglip2_version",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rival at one shape, dtype and mode."""

    op: str
    provider: str
    mode: str
    dtype: str  # "bf16", "fp16" or "fp32"
    shape: dict[str, int]
    status: Status
    detail: str = ""  # why it was not measured
    dropped: bool = False  # for want of time: another run may measure it
    error: float | None = None  # in units of bench/check.py
    grad_errors: dict[str, float] = field(default_factory=dict)  # regime -> relative L2
    time_ms: Quantiles | None = None
    peak_mib: float | None = None  # beyond the inputs
    # beyond inputs, returned tensors, and float32 accumulators of returned gradients
    workspace_mib: float | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    gemm_tflops: float | None = None  # of one large matrix product, timed in turn with this
    gemm_share: float | None = None  # tflops / gemm_tflops
    roofline: float | None = None  # share of what the datasheet's rates would allow
    speedup: float | None = None  # baseline's median / this median
    commit: str = ""
    timestamp: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.op, self.provider, self.mode, self.dtype, *sorted(self.shape.items()))


@dataclass(frozen=True, kw_only=True)
class Result:
    """Rows of one op on one machine."""

    op: str
    x_name: str
    x_label: str
    baseline: str
    machine: Machine
    check_shape: dict[str, int] = field(default_factory=dict)  # where errors were measured
    ours: list[str] = field(default_factory=list)  # providers that are this project
    rows: list[Row] = field(default_factory=list)


def write_json(path: Path, result: Result) -> None:
    """Replaces the file's rows of equal key; all of them if other software measured those."""
    rows = {row.key: row for row in _earlier_rows(path, result)}
    rows |= {row.key: row for row in result.rows}
    merged = {**asdict(result), "rows": [asdict(row) for row in rows.values()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(merged, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Result:
    raw = json.loads(path.read_text())
    rows = [Row(**{**row, "time_ms": _quantiles(row["time_ms"])}) for row in raw["rows"]]
    return Result(**{**raw, "machine": Machine(**raw["machine"]), "rows": rows})


def read_results(folder: Path) -> list[Result]:
    return [read_json(path) for path in sorted(folder.glob("*/*.json")) if path.name[0] != "."]


def csv_rows(result: Result, metrics: Sequence[str] = ("speed", "memory")) -> list[dict[str, Any]]:
    lines = []
    for row in result.rows:
        if row.status != "ok":
            continue
        if "speed" in metrics and row.time_ms is not None:
            q = row.time_ms
            lines.append(_csv_row(result, row, "speed", "ms", (q.p50, q.p20, q.p80)))
        if "memory" in metrics and row.peak_mib is not None:
            lines.append(_csv_row(result, row, "memory", "MB", (row.peak_mib,) * 3))
    return lines + _error_rows(result)


def write_csv(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Lines of a CSV written by `write_csv`; DataError if it is absent or has other columns."""
    if not path.is_file():
        raise DataError(f"need a CSV written by --save; there is no file {path}")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != CSV_COLUMNS:
            raise DataError(f"need a CSV written by --save; {path} has other columns")
        return list(reader)


def _error_rows(result: Result) -> list[dict[str, Any]]:
    """A line for each rival, dtype and regime: errors belong to the check, not to a timed shape."""
    checked = {(row.provider, row.dtype): row for row in result.rows if row.grad_errors}
    return [
        _csv_row(
            result,
            replace(row, mode="full", shape=result.check_shape),
            f"gradient error, {regime}",
            "relative L2",
            (error,) * 3,
        )
        for row in checked.values()
        for regime, error in row.grad_errors.items()
    ]


def _csv_row(
    result: Result, row: Row, metric: str, unit: str, values: tuple[float, float, float]
) -> dict[str, Any]:
    others = {name: size for name, size in row.shape.items() if name != result.x_name}
    cells = (
        row.op,
        row.provider,
        row.mode,
        metric,
        unit,
        result.x_name,
        result.x_label,
        row.shape[result.x_name],
        *values,
        json.dumps({**others, "dtype": row.dtype}),
        result.machine.name,
        row.timestamp,
        result.machine.siglip2,
    )
    return dict(zip(CSV_COLUMNS, cells, strict=True))


def _earlier_rows(path: Path, result: Result) -> list[Row]:
    if not path.exists():
        return []
    earlier = read_json(path)
    return earlier.rows if earlier.machine.software == result.machine.software else []


def _quantiles(raw: dict[str, float] | None) -> Quantiles | None:
    return None if raw is None else Quantiles(**raw)
