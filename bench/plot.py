"""Time and peak memory against size, both axes logarithmic, one line a rival."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .result import Result, Row


def save_plot(path: Path, result: Result, *, mode: str = "full") -> bool:
    """Writes a PNG; False without matplotlib or with fewer than two sizes to join by a line."""
    rows = [row for row in result.rows if row.mode == mode and row.time_ms is not None]
    sizes = {row.shape[result.x_name] for row in rows}
    if find_spec("matplotlib") is None or len(sizes) < 2:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: list[tuple[str, Callable[[Row], float | None]]] = [("ms", lambda row: row.time_ms.p50)]
    if any(row.peak_mib for row in rows):
        panels.append(("peak MiB", lambda row: row.peak_mib))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, value) in zip(grid, panels, strict=True):
        for provider in dict.fromkeys(row.provider for row in rows):
            points = sorted(
                (row.shape[result.x_name], value(row))
                for row in rows
                if row.provider == provider and value(row)
            )
            style = "-" if provider in result.ours else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=provider)
        axes.set(
            xscale="log", yscale="log", xlabel=f"{result.x_label} ({result.x_name})", ylabel=label
        )
        axes.grid(True, which="both", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    figure.suptitle(f"{result.op}, {mode}, {dtypes}, {result.machine.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
