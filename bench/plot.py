"""Time, peak memory and share of the matrix-product rate against size, one line a rival."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .result import Result, Row

PANELS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("ms", lambda row: row.time_ms.p50, "log"),
    ("peak MiB", lambda row: row.peak_mib, "log"),
    ("% of the measured GEMM rate", lambda row: row.gemm_share and 100 * row.gemm_share, "linear"),
)


def save_plot(path: Path, result: Result, *, mode: str = "full") -> bool:
    """Writes a PNG; False without matplotlib or with fewer than two sizes to join by a line.

    Sizes run along the case's own dimension; each value of the others gets a row of panels.
    """
    rows = [row for row in result.rows if row.mode == mode and row.time_ms is not None]
    series = {
        others: [row for row in rows if _others(result, row) == others]
        for others in sorted({_others(result, row) for row in rows})
    }
    series = {k: v for k, v in series.items() if len({r.shape[result.x_name] for r in v}) > 1}
    if find_spec("matplotlib") is None or not series:
        return False
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(panel[1](row) for row in rows)]
    size = (5 * len(panels), 4 * len(series))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(series), len(panels), squeeze=False)
    providers = list(dict.fromkeys(row.provider for row in rows))
    for line, (others, members) in zip(grid, series.items(), strict=True):
        for axes, (label, value, scale) in zip(line, panels, strict=True):
            _draw(axes, result, members, providers, value)
            x_label = f"{result.x_label} ({result.x_name})"
            axes.set(xscale="log", yscale=scale, xlabel=x_label, ylabel=label)
            axes.set_title(", ".join(f"{name}={size}" for name, size in others), fontsize="small")
            axes.grid(True, which="both", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    figure.suptitle(f"{result.op}, {mode}, {dtypes}, {result.machine.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def _others(result: Result, row: Row) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name, size in row.shape.items() if name != result.x_name)


def _draw(
    axes, result: Result, rows: Sequence[Row], providers: Sequence[str], value: Callable
) -> None:
    for i, provider in enumerate(providers):
        points = sorted(
            (row.shape[result.x_name], value(row))
            for row in rows
            if row.provider == provider and value(row)
        )
        if not points:
            continue
        style = "-" if provider in result.ours else "--"
        color = f"C{i % 10}"  # the same rival, the same colour in each panel
        axes.plot(
            *zip(*points, strict=True), style, marker="o", markersize=3, label=provider, color=color
        )
