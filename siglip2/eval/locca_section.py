"""The report's section on the captioning decoder. Every word that comes from data is escaped."""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from siglip2.eval.charts import line_chart, number
from siglip2.eval.grounding import IS_FOUND
from siglip2.eval.locca import LocCaResult
from siglip2.eval.locca_examples import FOUND, TRUE, LocCaExamples, SourceExamples
from siglip2.eval.sections import MARKS, humanize, language_name, percent, tile
from siglip2.eval.table import CAPTION_BASELINES

Points = Sequence[tuple[float, float]]
_WHAT = (
    "<p>A decoder reads the image tokens and says captions, a box for a phrase, and a phrase for a"
    f" box. A box counts as found when it overlaps the true one by {IS_FOUND:g} (intersection over"
    " union). Each number stands beside what a guess without a picture reaches.</p>"
)


def locca_section(
    results: dict[str, LocCaResult],
    examples: LocCaExamples,
    curves: dict[str, Points],  # title -> (step, value)
) -> str:
    """Numbers of each source, learning curves, pictures with boxes, captions."""
    charts = "".join(line_chart({title: curve}, title=title) for title, curve in curves.items())
    parts = [_WHAT, f'<div class="grid charts">{charts}</div>' if charts else ""]
    shown = {source.name: source for source in examples.sources}
    for name, result in results.items():
        parts.append(_numbers(name, result))
        if name in shown:
            parts.append(_examples(shown[name]))
    return "".join(parts)


def _numbers(name: str, result: LocCaResult) -> str:
    mean, tiles = result.captions["mean"], []
    if result.refer:
        found = result.refer
        tiles += [
            tile(
                percent(found["accuracy"]),
                f"boxes found (Acc@{IS_FOUND:g}); best constant box"
                f" {percent(found['constant_accuracy'])}",
            ),
            tile(
                f"{found['mean_iou']:.2f}",
                f"mean overlap; best constant box {found['constant_mean_iou']:.2f}",
            ),
            tile(percent(found["are_boxes"]), "of answers are boxes at all"),
        ]
    if result.ground:
        found = result.ground
        tiles.append(
            tile(
                percent(found["exact_any"]),
                "phrases of boxes right in any language (in the one drawn:"
                f" {percent(found['exact'])}); the commonest phrase"
                f" {percent(found['constant_exact_any'])} ({percent(found['constant_exact'])})",
            )
        )
    if "accuracy" in mean:
        words = "caption tokens right"
        if mean["num_languages"] > 1:
            words += f", mean of {mean['num_languages']} languages"
        always, place = percent(mean["unigram"]), percent(mean["by_place"])
        words += f"; always the commonest {always}, the commonest at each place {place}"
        tiles.append(tile(percent(mean["accuracy"]), words))
        tiles.append(tile(f"{mean['loss']:.3f}", "caption loss, nats a token"))
    tag = f"<span class='tag'>{result.num_images:,} images"
    tag += f", {result.refer['num_regions']:,} regions</span>" if result.refer else "</span>"
    return (
        f"<h3>{escape(humanize(name))} {tag}</h3>"
        f'<div class="grid tiles wide">{"".join(tiles)}</div>{_languages(result)}'
    )


def _languages(result: LocCaResult) -> str:
    heads = ("language", "captions", "tokens", "loss", "tokens right", *CAPTION_BASELINES)
    rows = []
    for language, values in result.captions["languages"].items():
        mark = "" if values["in_mean"] else " *"
        cells = [f"{values['num_texts']:,}", f"{values['num_tokens']:,}", f"{values['loss']:.3f}"]
        cells += [percent(values[x]) for x in ("accuracy", *CAPTION_BASELINES.values())]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(language_name(language) + mark)}</td>{numbers}</tr>")
    if not rows:
        return ""
    few = any(not values["in_mean"] for values in result.captions["languages"].values())
    where = f"Baselines are the commonest of the {result.captions['baseline']} captions' tokens."
    where += " * names few of the images, so not in the mean." if few else ""
    heads_html = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f"<details><summary>Captions in {len(rows)} languages, token by token from the true ones"
        f' before</summary><div class="scroll"><table><thead><tr>{heads_html}</tr></thead><tbody>'
        f'{"".join(rows)}</tbody></table></div><p class="note">{where}</p></details>'
    )


def _examples(source: SourceExamples) -> str:
    regions = [region for image in source.images for region in image["regions"]]
    right, count = sum(region["right"] for region in regions), number(len(source.images))
    keys = "".join(
        f'<span class="key" style="--key:rgb{colour}">{words}</span>'
        for colour, words in (
            (TRUE, "true box, whole line"),
            (FOUND, "box said, dashed, joined to the true one"),
        )
    )
    boxes = (
        f'<p class="note">{right} of these {len(regions)} boxes are right.</p>'
        f'<div class="keys">{keys}</div>'
    )
    return (
        f"<h3>{escape(humanize(source.name))}: {count} pictures, drawn before looking at the"
        f" answers</h3>{boxes if regions else ''}"
        f'<div class="grid cards">{"".join(_card(source, image) for image in source.images)}</div>'
    )


def _card(source: SourceExamples, image: dict[str, Any]) -> str:
    data = base64.b64encode(source.pictures[image["key"]]).decode()
    words = "; ".join(f"{x['phrase']}: {_verdict(x)}" for x in image["regions"])
    alt = escape(words or f"picture {image['key']}")
    labels = "".join(map(_label, image["regions"]))
    return (
        f'<article class="card"><div class="boxed"><img alt="{alt}"'
        f' src="data:image/png;base64,{data}">{labels}</div>{_caption(image["caption"])}</article>'
    )


def _label(region: dict[str, Any]) -> str:
    """The phrase, where its true box begins, with a mark."""
    x0, y0, x1, _ = region["box"]
    across = f"left:{100 * x0:.2f}%" if x0 + x1 < 1 else f"right:{100 - 100 * x1:.2f}%"
    kind = "right" if region["right"] else "wrong"
    none = " (no box)" if region["found"] is None else ""
    return (
        f'<span class="{kind}" style="{across};top:{100 * y0:.2f}%"'
        f' title="{escape(_verdict(region))}">{MARKS[region["right"]]}'
        f' <bdi lang="{escape(region["language"])}">{escape(region["phrase"])}</bdi>{none}</span>'
    )


def _verdict(region: dict[str, Any]) -> str:
    if region["found"] is None:
        return f"no box, but {region['said_box']!r}"
    return f"{'right' if region['right'] else 'wrong'}, overlap {region['iou']:.2f}"


def _caption(caption: dict[str, str]) -> str:
    lang = escape(caption["language"])
    rows = (
        f'<dt>{name}</dt><dd><span lang="{lang}" dir="auto">{escape(caption[name])}</span></dd>'
        for name in ("said", "true")
    )
    return f'<dl class="said">{"".join(rows)}</dl>'


def comparison(
    sources: dict[str, Any],  # of this run, and of the other: `EvalResult.sources`
    others: dict[str, Any],
    *,
    names: tuple[str, str],
) -> str:
    """Mean recalls of two runs on the sources that both were evaluated on, in percent."""
    directions = (("image to caption", "i2t_r1"), ("caption to image", "t2i_r1"))
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in (*names, "difference"))
    ways = "".join(f'<th scope="colgroup" colspan="3">{way}</th>' for way, _ in directions)
    rows = []
    for source, subset in ((s, x) for s in sources for x in sources[s]):
        mine, other = sources[source][subset], others.get(source, {}).get(subset)
        if other is None:
            continue
        where = humanize(source) + ("" if subset == "all" else f" - {subset}")
        counts = [found["num_images"] for found in (mine, other)]
        cells = [" and ".join(f"{count:,}" for count in dict.fromkeys(counts))]
        for _, column in directions:
            values = [100 * found["mean"][column] for found in (mine, other)]
            cells += [*(f"{value:.1f}" for value in values), f"{values[0] - values[1]:+.1f}"]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(where)}</td>{numbers}</tr>")
    return (
        "<p>Recall at 1 in percent, the mean over languages, of two runs on the same sets.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col" rowspan="2">set</th>'
        f'<th scope="col" rowspan="2">images</th>{ways}</tr><tr>{heads * 2}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
