"""A run as one HTML page, made of the files in its folder alone, as often as wanted."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from siglip2.errors import DataError, require
from siglip2.eval.charts import line_chart, number
from siglip2.eval.dense_report import dense_section
from siglip2.eval.gallery import Gallery, load_gallery
from siglip2.eval.locca import LocCaResult
from siglip2.eval.locca_examples import FOLDER, load_examples
from siglip2.eval.locca_section import comparison, locca_section
from siglip2.eval.page import page
from siglip2.eval.resolutions import budget_section
from siglip2.eval.sections import gallery_section, humanize, percent, retrieval, tile
from siglip2.files import write_atomic

FILE = "report.html"
Rows = list[dict[str, Any]]


def read_metrics(path: Path) -> Rows:
    """The rows of a metrics.jsonl; a torn last line is dropped. Raises DataError."""
    if not path.is_file():
        raise DataError(
            f"need the run's metrics.jsonl to report on; none in {path.parent}. Give the folder"
            " that train.output_dir named"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for index, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if index + 1 < len(lines):
                raise DataError(f"{path}, line {index + 1} is not JSON: {error}") from None
    rows = [row for row in rows if isinstance(row, dict) and "step" in row]
    if not any("train/loss" in row for row in rows):
        raise DataError(f"{path} holds no step yet: train first")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    """An optional file: empty when it is not there."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): run the evaluation again") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    yaml = require("yaml", "train")
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _series(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _hardware(env: dict[str, Any], result: dict[str, Any]) -> str:
    if env.get("gpu"):
        return env["gpu"]
    if env.get("threads"):
        return f"CPU, {env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    return result.get("device", "")


def _lead(config: dict[str, Any]) -> str:
    model, data = config.get("model", {}), config.get("data", {})
    if not model:
        return ""
    start = model.get("pretrained") or "random weights"
    words = (
        f"{model.get('name')}, trained from {start} on {data.get('train')},"
        f" batch {config.get('train', {}).get('batch_size')}."
    )
    return f'<p class="lead">{escape(words)}</p>'


def _tiles(rows: Rows, env: dict[str, Any], result: dict[str, Any]) -> str:
    last = [row for row in rows if "train/loss" in row][-1]
    speeds = [row["perf/samples_per_second"] for row in rows if "perf/samples_per_second" in row]
    tiles, recalls = [], []
    for source, subsets in result.get("sources", {}).items():
        for subset, found in subsets.items():
            mean, where = found["mean"], source if subset == "all" else f"{source}, {subset}"
            languages = found["mean"]["num_languages"]
            over = f", mean of {languages} languages" if languages > 1 else ""
            chance = percent(mean["chance_i2t_r1"])
            label = f"{humanize(where)}: image to caption R@1{over}; chance {chance}"
            recalls.append(tile(percent(mean["i2t_r1"]), label))
    if "examples" in last:
        tiles.append(tile(f"{last['examples']:,}", "images seen"))
    if "time_s" in last:
        tiles.append(tile(_minutes(last["time_s"]), "training time"))
    if speeds:
        tiles.append(tile(number(sorted(speeds)[len(speeds) // 2]), "images a second, median"))
    if "num_parameters" in result:
        tiles.append(tile(number(result["num_parameters"]), "parameters"))
    if _hardware(env, result):
        tiles.append(tile(_hardware(env, result), "hardware"))
    tiles.append(tile(number(last["train/loss"]), f"loss at step {last['step']:,}"))
    first = f'<div class="grid tiles wide">{"".join(recalls)}</div>' if recalls else ""
    return f'{first}<div class="grid tiles">{"".join(tiles)}</div>'


def _curves(rows: Rows) -> str:
    norms = [(x, math.log10(y)) for x, y in _series(rows, "train/grad_norm") if y > 0]
    charts = [
        line_chart({"loss": _series(rows, "train/loss")}, title="Loss", smooth=True),
        line_chart({"t": _series(rows, "train/logit_scale")}, title="Temperature t"),
        line_chart({"b": _series(rows, "train/logit_bias")}, title="Bias b"),
        line_chart({"lr": _series(rows, "train/lr")}, title="Learning rate", from_zero=True),
        line_chart({"norm": norms}, title="Gradient norm, log10", smooth=True),
        line_chart(
            {"speed": _series(rows, "perf/samples_per_second")},
            title="Images a second",
            from_zero=True,
        ),
        line_chart(
            {"waiting": _series(rows, "perf/data_time_pct")},
            title="Time waiting for data, %",
            from_zero=True,
        ),
    ]
    terms = sorted(
        {k for row in rows for k in row if k.startswith("train/") and k.endswith("_loss")}
    )
    if len(terms) > 1:
        series = {term[len("train/") : -len("_loss")]: _series(rows, term) for term in terms}
        charts.insert(1, line_chart(series, title="Losses"))
    spreads = {name: _series(rows, f"train/{name}_teacher_spread") for name in ("image", "patch")}
    title = "Self-distillation: spread of the teacher's answers"
    charts.append(line_chart(spreads, title=title, from_zero=True))
    keys = sorted({k for row in rows for k in row if k.endswith("/mean/i2t_r1")})
    recalls = {k[len("val/") : -len("/mean/i2t_r1")]: _series(rows, k) for k in keys}
    charts.append(line_chart(recalls, title="R@1, image to caption", from_zero=True))
    return f'<div class="grid charts">{"".join(charts)}</div>'


def _skipped(rows: Rows) -> str:
    bad = sum(
        1
        for row in rows
        if "train/loss" in row and not math.isfinite(row["train/loss"] or math.nan)
    )
    return (
        f'<p class="note">{bad} logged losses are not finite; curves leave them out.</p>'
        if bad
        else ""
    )


def _galleries(gallery: Gallery) -> str:
    if not gallery.sources:
        return ""
    parts = "".join(gallery_section(source) for source in gallery.sources)
    return (
        '<h2 id="examples">Examples</h2><p>Drawn at random with a fixed seed, before looking at the'
        " answers. A picture or caption is right when it belongs to the same concept; one that is"
        f" wrong by this count may still describe the picture.</p>{parts}"
    )


def _footer(env: dict[str, Any]) -> str:
    names = ("siglip2", "torch", "python", "platform")
    words = ", ".join(f"{name} {env[name]}" for name in names if env.get(name))
    return f"<footer>{escape(words)}</footer>" if words else ""


def _locca(run_dir: Path, rows: Rows, results: dict[str, Any]) -> str:
    found = {name: LocCaResult.from_dict(fields) for name, fields in results.items()}
    curves = {
        "Loss of the decoder": _series(rows, "train/locca_loss"),
        "Tokens right, in training": _series(rows, "train/token_accuracy"),
    }
    for key in sorted({k for row in rows for k in row if k.endswith("/locca/refer/accuracy")}):
        curves[f"Boxes found: {key.split('/')[1]}"] = _series(rows, key)
    return locca_section(found, load_examples(run_dir / FOLDER), curves)


def _comparison(run_dir: Path, sources: dict[str, Any], other: Path) -> str:
    others = _read_json(other / "eval.json").get("sources", {})
    if not sources.keys() & others.keys():
        raise DataError(
            f"need a run evaluated on a set of this run's to compare with: {sorted(sources)};"
            f" {other / 'eval.json'} has {sorted(others)}"
        )
    names = (run_dir.resolve().name, other.resolve().name)
    return comparison(sources, others, names=names)


def write_report(run_dir: str | Path, *, compare: str | Path | None = None) -> Path:
    """Write report.html into a run's folder and return its path.

    Reads metrics.jsonl and, where they exist, config.yaml, env.json, eval.json, gallery/ and
    locca/. Raises DataError when metrics.jsonl is missing or a file is damaged.

    Args:
        compare: Another run's folder, whose recalls are set beside this run's.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    env, result = _read_json(run_dir / "env.json"), _read_json(run_dir / "eval.json")
    gallery = load_gallery(run_dir / "gallery")
    title = f"Training report: {run_dir.resolve().name}"
    links = [("training", "Training")]
    body = [
        _tiles(rows, env, result),
        '<h2 id="training">Training</h2>',
        _skipped(rows),
        _curves(rows),
    ]
    if result.get("sources"):
        links.append(("retrieval", "Retrieval"))
        body.append(
            '<h2 id="retrieval">Retrieval by language</h2><p>How often the right caption (or'
            " picture) is the first, or among the first five, of all in the set. Ties count as"
            " wrong.</p>"
        )
        body.append(retrieval(result["sources"]))
    if compare is not None:
        links.append(("compared", "Compared"))
        body.append('<h2 id="compared">Compared with another run</h2>')
        body.append(_comparison(run_dir, result.get("sources", {}), Path(compare)))
    if result.get("budgets"):
        links.append(("budgets", "Resolutions"))
        body.append(budget_section(result["budgets"]))
    if result.get("locca"):
        links.append(("locca", "Captions and boxes"))
        body.append('<h2 id="locca">Captions and boxes</h2>')
        body.append(_locca(run_dir, rows, result["locca"]))
    if result.get("dense"):
        links.append(("dense", "Dense features"))
        others = {} if compare is None else _read_json(Path(compare) / "eval.json")
        body.append('<h2 id="dense">Dense features</h2>')
        body.append(dense_section(result["dense"], others.get("dense", {})))
    if gallery.sources:
        links.append(("examples", "Examples"))
        body.append(_galleries(gallery))
    nav = "".join(f'<a href="#{anchor}">{label}</a>' for anchor, label in links)
    head = f"<header><h1>{escape(title)}</h1>{_lead(_read_config(run_dir / 'config.yaml'))}"
    head += f"<nav>{nav}</nav></header>"
    path = run_dir / FILE
    write_atomic(path, page(title, head + "".join(body) + _footer(env)))
    return path
