"""The report's section on NaFlex models: one model at many numbers of patches."""

from html import escape
from typing import Any

from siglip2.eval.charts import line_chart
from siglip2.eval.sections import humanize, percent

_HEADS = ("patches, at most", "in training", "patches, mean", "images of", "R@1 image to caption")
_MORE = ("R@1 caption to image", "chance")


def budget_section(rows: list[dict[str, Any]]) -> str:
    """A chart and a table of `EvalResult.budgets`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(_name(row), []).append((row["budget"], row["mean"]["i2t_r1"]))
    chart = line_chart(
        {name: sorted(points) for name, points in curves.items()},
        title="R@1, image to caption, by patches an image may have",
        from_zero=True,
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in (*_HEADS, *_MORE))
    body = "".join(_line(row) for row in rows)
    return (
        '<h2 id="budgets">Resolutions</h2><p>The same model at every number of patches asked for,'
        f' trained at or not.</p><div class="grid charts">{chart}</div><div class="scroll">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _name(row: dict[str, Any]) -> str:
    where = row["source"] if row["subset"] == "all" else f"{row['source']}, {row['subset']}"
    return humanize(where)


def _line(row: dict[str, Any]) -> str:
    mean = row["mean"]
    recalls = [percent(mean[name]) for name in ("i2t_r1", "t2i_r1", "chance_i2t_r1")]
    seen = "yes" if row["seen"] else "no"
    cells = [seen, f"{row['num_patches']:.1f}", escape(_name(row)), *recalls]
    return f"<tr><td>{row['budget']}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
