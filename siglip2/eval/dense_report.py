"""Dense features in a run's results: evaluated beside retrieval, in the table and on the page."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from siglip2.config import DataConfig, EvalConfig
from siglip2.data.scenes import Scenes
from siglip2.data.sources import open_source
from siglip2.eval.dense import evaluate_dense
from siglip2.eval.sections import humanize, tile
from siglip2.models.siglip2 import Siglip2

if TYPE_CHECKING:
    from siglip2.eval.runner import EvalResult

MAX_SCENES = 500  # the probe is scored on; it is fitted to twice as many
_COLUMNS = {
    "miou": "mIoU",
    "object_miou": "mIoU of objects",
    "background_miou": "all background",
    "pixel_accuracy": "pixels right",
    "knn_accuracy": "k-NN",
}
_WHAT = (
    "<p>What frozen features know of places and things: a linear probe on patch tokens names every"
    " pixel (mean intersection over union, mIoU), and the 20 nearest embeddings name a scene's only"
    " drawing (k-NN). Pixels of composed scenes are known exactly.</p>"
)


def add_dense(
    result: "EvalResult",
    model: Siglip2,
    sources: Mapping[str, Any],
    data: DataConfig,
    config: EvalConfig,
    *,
    progress: Callable[[str], None] | None = None,
) -> "EvalResult":
    """`result` with `evaluate_dense` of each source of scenes; other data has no true pixels."""
    say, found = progress or (lambda text: None), {}
    for name, source in sources.items():
        if not isinstance(source, Scenes):
            continue
        say(f"probing dense features on {name}")
        num_test = min(config.max_images or MAX_SCENES, MAX_SCENES)
        dense = evaluate_dense(
            model,
            open_source("scenes:train", data),
            source,
            num_train=2 * num_test,
            num_test=num_test,
            batch_size=config.batch_size,
        )
        values = {**dense.segmentation._asdict(), "knn_accuracy": dense.knn_accuracy}
        counts = {"num_classes": dense.num_classes, "num_train": 2 * num_test, "num_test": num_test}
        found[name] = {**{key: values[key] for key in _COLUMNS}, **counts}
    return replace(result, dense=found) if found else result


def dense_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For the console: a head, and a line for each source, in percent."""
    rows = [("source", "scenes", "classes", *_COLUMNS.values())]
    for source, found in results.items():
        numbers = (f"{100 * found[column]:.1f}" for column in _COLUMNS)
        rows.append((source, str(found["num_test"]), str(found["num_classes"]), *numbers))
    return rows


def dense_section(
    results: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],  # of a run to compare with; may be empty
) -> str:
    """Numbers of each source, and the other run's beside them."""
    parts = [_WHAT]
    for source, found in results.items():
        other = others.get(source)
        tiles = [
            tile(f"{100 * found[column]:.1f} %", label + _beside(found, other, column))
            for column, label in _COLUMNS.items()
        ]
        counts = (
            f"{found['num_test']:,} scenes, {found['num_classes'] - 1} things;"
            f" probe fitted to {found['num_train']:,} scenes"
        )
        parts.append(
            f"<h3>{escape(humanize(source))} <span class='tag'>{counts}</span></h3>"
            f'<div class="grid tiles wide">{"".join(tiles)}</div>'
        )
    return "".join(parts)


def _beside(mine: Mapping[str, Any], other: Mapping[str, Any] | None, column: str) -> str:
    """The other run's number and what sets them apart, in percentage points."""
    if other is None:
        return ""
    points = 100 * (mine[column] - other[column])
    return f"; the other run {100 * other[column]:.1f} % ({points:+.1f})"
