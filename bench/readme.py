"""The README's table of measurements, generated from bench/results: no number is typed by hand."""

from pathlib import Path
from textwrap import shorten

from siglip2.errors import DataError

from .report import geometric_mean, markdown_table
from .result import Result, Row, read_results

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
EMPTY = "Not measured on a GPU yet: `make gpu` on a machine with one fills this table."
NOT_MEASURED = "not measured"
MODE = "full"


def block(results: Path) -> str:
    """What stands between the markers. Measurements on a CPU do not count."""
    parts = [
        part
        for result in read_results(results)
        if result.machine.device == "cuda"
        for part in _op_block(result)
    ]
    return "\n\n".join(parts or [EMPTY])


def update(readme: Path, results: Path) -> None:
    """Rewrites the block; DataError if the markers are not there."""
    before, _, after = _split(readme)
    readme.write_text(f"{before}{BEGIN}\n{block(results)}\n{END}{after}")


def problem(readme: Path, results: Path) -> str | None:
    """Why the README does not show bench/results, or None when it does."""
    try:
        _, inside, _ = _split(readme)
    except DataError as error:
        return str(error)
    if inside.strip() == block(results).strip():
        return None
    return f"{readme.name} does not match {results}: run 'siglip2 bench --readme'"


def _split(readme: Path) -> tuple[str, str, str]:
    text = readme.read_text() if readme.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(
            f"need the lines {BEGIN} and {END} in {readme}; put them where the table goes"
        )
    return before, inside, after


def _op_block(result: Result) -> list[str]:
    parts = []
    rows = [row for row in result.rows if row.mode == MODE]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        same = [row for row in rows if row.dtype == dtype]
        parts += _table(result, same, dtype)
    return parts


def _table(result: Result, rows: list[Row], dtype: str) -> list[str]:
    """Sizes down, rivals across. Rivals that never ran are named below, accuracy in a table."""
    measured = [row for row in rows if row.time_ms is not None]
    if not measured:
        return []
    names = list(dict.fromkeys(row.provider for row in measured))
    shapes = list(dict.fromkeys(tuple(row.shape.items()) for row in rows))
    cells = {(tuple(row.shape.items()), row.provider): _cell(row) for row in rows}
    lines = [
        [
            " ".join(f"{k}={v}" for k, v in shape),
            *(cells.get((shape, n), NOT_MEASURED) for n in names),
        ]
        for shape in sorted(shapes)
    ]
    commits = ", ".join(sorted({row.commit for row in measured if row.commit})) or "not recorded"
    machine = result.machine
    caption = (
        f"`{result.op}`, forward and backward, {dtype}, {machine.name}: median ms / peak MiB beyond"
        " the inputs / share of the rate of one large matrix product, timed in turn with the rivals"
        f" (torch {machine.torch}, triton {machine.triton}, driver {machine.driver},"
        f" commit {commits})."
    )
    absent = {
        r.provider: shorten(f"{r.status}: {r.detail}".rstrip(": "), 120, placeholder=" ...")
        for r in rows
        if r.provider not in names
    }
    notes = [f"Not in the table: {'; '.join(f'{n} ({why})' for n, why in absent.items())}."]
    table = "\n".join(markdown_table([result.x_label, *names], lines))
    speedups = _speedups(result, measured)
    return [caption, table, *speedups, *(notes if absent else []), *_errors(result, rows)]


def _errors(result: Result, rows: list[Row]) -> list[str]:
    """Rivals down, regimes across: gradient errors against float64."""
    by_rival = {row.provider: row.grad_errors for row in rows if row.grad_errors}
    labels = list(dict.fromkeys(label for errors in by_rival.values() for label in errors))
    if not labels:
        return []
    lines = [
        [name, *(f"{e[label]:.1e}" if label in e else NOT_MEASURED for label in labels)]
        for name, e in by_rival.items()
    ]
    shape = " ".join(f"{name}={size}" for name, size in result.check_shape.items())
    caption = f"Relative L2 error of the gradients against float64, {rows[0].dtype}, {shape}:"
    return [caption, "\n".join(markdown_table(["rival", *labels], lines))]


def _speedups(result: Result, measured: list[Row]) -> list[str]:
    ours = next((name for name in result.ours if any(r.provider == name for r in measured)), None)
    by_shape: dict[tuple, dict[str, float]] = {}
    for row in measured:
        by_shape.setdefault(tuple(row.shape.items()), {})[row.provider] = row.time_ms.p50
    both = [times for times in by_shape.values() if ours in times]
    against_base = [t[result.baseline] / t[ours] for t in both if result.baseline in t]
    rivals = [[ms for name, ms in t.items() if name not in result.ours] for t in both]
    against_best = [min(r) / t[ours] for r, t in zip(rivals, both, strict=True) if r]
    parts = [
        f"{geometric_mean(values):.2f}x {name} ({len(values)} of {len(by_shape)} shapes)"
        for name, values in ((result.baseline, against_base), ("the fastest rival", against_best))
        if values
    ]
    return [f"{ours}, geometric mean of speed-ups: {', '.join(parts)}."] if parts else []


def _cell(row: Row) -> str:
    if row.time_ms is None:
        return f"{row.status} ({row.detail})" if row.status == "wrong" else row.status
    memory = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    share = "-" if row.gemm_share is None else f"{row.gemm_share:.0%}"
    return f"{row.time_ms.p50:.3f} / {memory} / {share}"
