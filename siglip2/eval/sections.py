"""The report's sections as HTML: recalls, galleries. Every word that comes from data is escaped."""

import base64
from html import escape
from typing import Any

from siglip2.eval.charts import number
from siglip2.eval.gallery import SourceGallery

MARKS = {True: "&#10003;", False: "&#10007;"}  # a tick, a cross
_MAX_BARS = 30  # languages drawn; the table holds all
_LANGUAGES = {
    **{
        "ar": "Arabic",
        "bn": "Bengali",
        "cs": "Czech",
        "da": "Danish",
        "de": "German",
        "el": "Greek",
    },
    **{"en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French"},
    **{"he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian"},
    **{"ja": "Japanese", "ko": "Korean", "nl": "Dutch", "no": "Norwegian", "pl": "Polish"},
    **{"pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "sw": "Swahili"},
    **{"th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese"},
    "und": "language not given",
}
_DIRECTIONS = {"i2t": "Image to caption", "t2i": "Caption to image"}


def humanize(name: str) -> str:
    """ "held_out" -> "Held out"."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def language_name(tag: str) -> str:
    return _LANGUAGES.get(tag, tag)


def tile(value: str, label: str) -> str:
    size = ' class="long"' if len(value) > 12 else ""
    return f'<div class="tile"><b{size}>{escape(value)}</b><span>{escape(label)}</span></div>'


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value < 0.0995 else f"{100 * value:.0f} %"


def _bar_row(label: str, values: dict[str, Any], direction: str, kind: str = "") -> str:
    one, five = values[f"{direction}_r1"], values[f"{direction}_r5"]
    chance = values[f"chance_{direction}_r1"]
    return (
        f'<span class="{kind}">{escape(label)}</span>'
        f'<div class="bar" title="{escape(label)}: R@1 {percent(one)}, R@5 {percent(five)},'
        f' chance {percent(chance)}">'
        f'<i class="five" style="width:{100 * five:.2f}%"></i>'
        f'<i style="width:{100 * one:.2f}%"></i><u style="left:{100 * chance:.2f}%"></u></div>'
        f'<span class="{kind}">{percent(one)}</span>'
    )


def _bars(found: dict[str, Any], direction: str) -> str:
    counted = {x: values for x, values in found["languages"].items() if values["in_mean"]}
    best_first = sorted(counted.items(), key=lambda item: -item[1][f"{direction}_r1"])
    rows = [_bar_row("mean", found["mean"], direction, "mean")] if len(counted) > 1 else []
    rows += [
        _bar_row(language_name(language), values, direction)
        for language, values in best_first[:_MAX_BARS]
    ]
    return (
        f'<div class="card"><figcaption>{_DIRECTIONS[direction]}</figcaption>'
        '<div class="keys s0"><span class="key">R@1</span><span class="key light">R@5</span>'
        '<span class="key line">chance of R@1</span></div>'
        f'<div class="bars">{"".join(rows)}</div></div>'
    )


def _table(found: dict[str, Any]) -> str:
    columns = [f"{d}_r{k}" for d in _DIRECTIONS for k in (1, 5, 10)] + ["chance_i2t_r1"]
    heads = ["language", "images", "captions"]
    heads += [f"{d} R@{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)] + ["chance"]
    rows = []
    for language, values in found["languages"].items():
        mark = "" if values["in_mean"] else " *"
        cells = [str(values["num_images"]), str(values["num_texts"])]
        cells += [f"{100 * values[column]:.1f}" for column in columns]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(language + mark)}</td>{numbers}</tr>")
    few = any(not values["in_mean"] for values in found["languages"].values())
    note = '<p class="note">* names few of the images, so not in the mean or the bars.</p>'
    heads_html = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<details><summary>All {len(rows)} languages, in percent</summary><div class="scroll">'
        f"<table><thead><tr>{heads_html}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{note if few else ''}</details>"
    )


def _zero_shot(scores: dict[str, Any]) -> str:
    left_out = scores["num_without_class"]
    also = f" ({left_out} images of no listed class left out)" if left_out else ""
    return (
        f"<p>Zero-shot classification into {scores['num_classes']:,} classes:"
        f" <b>{percent(scores['top1'])}</b> top-1, <b>{percent(scores['top5'])}</b> top-5 over"
        f" {scores['num_images']:,} images{also}; chance {percent(scores['chance_top1'])}.</p>"
    )


def retrieval(sources: dict[str, Any]) -> str:
    """Bars and a table for each source and subset."""
    out = []
    for source, subsets in sources.items():
        for subset, found in subsets.items():
            name = humanize(source) + ("" if subset == "all" else f" - {subset}")
            count = found["num_images"]
            out.append(f"<h3>{escape(name)} <span class='tag'>{count:,} images</span></h3>")
            if "zero_shot" in found:
                out.append(_zero_shot(found["zero_shot"]))
            bars = "".join(_bars(found, direction) for direction in _DIRECTIONS)
            out.append(f'<div class="grid two">{bars}</div>{_table(found)}')
    return "".join(out)


def _picture(gallery: SourceGallery, key: str, alt: str) -> str:
    data = base64.b64encode(gallery.pictures[key]).decode()
    return f'<img class="pic" alt="{escape(alt)}" src="data:image/webp;base64,{data}">'


def _query(gallery: SourceGallery, query: dict[str, Any]) -> str:
    language, script = escape(query["language"]), query["script"]
    name = language_name(query["language"])
    name = escape(name if script == name else f"{name}, {script} script")
    hits = []
    for hit in query["hits"]:
        kind = "right" if hit["right"] else "wrong"
        picture = _picture(gallery, hit["key"], f"{kind}: {hit['caption']}")
        hits.append(
            f'<li class="{kind}" title="{escape(hit["caption"])}">{picture}'
            f'<span aria-hidden="true">{MARKS[hit["right"]]}</span></li>'
        )
    return (
        f'<article class="card"><div class="ask"><q lang="{language}" dir="auto">'
        f'{escape(query["text"])}</q><span class="tag">{name}</span></div>'
        f'<ol class="hits">{"".join(hits)}</ol></article>'
    )


def _names(language: str, names: list[dict[str, Any]]) -> str:
    """The best caption with its mark, then the runners-up."""
    lang = escape(language)
    first, *others = names
    kind = "right" if first["right"] else "wrong"
    mark = f'<b class="{kind}" title="{kind}">{MARKS[first["right"]]}</b>'
    tick = f' <b class="right">{MARKS[True]}</b>'
    also = "; ".join(
        f"<bdi>{escape(name['text'])}</bdi>{tick if name['right'] else ''}" for name in others
    )
    return (
        f"<dt>{escape(language_name(language))}</dt><dd>{mark} "
        f'<span lang="{lang}" dir="auto">{escape(first["text"])}</span>'
        f'<div class="also" lang="{lang}" dir="auto">{also}</div></dd>'
    )


def _card(gallery: SourceGallery, card: dict[str, Any]) -> str:
    names = "".join(_names(language, found) for language, found in card["languages"].items())
    return (
        f'<article class="card named">{_picture(gallery, card["key"], card["caption"])}'
        f"<dl>{names}</dl></article>"
    )


def gallery_section(gallery: SourceGallery) -> str:
    """Nearest pictures and nearest captions of one source."""
    queries, cards = gallery.by_caption, gallery.by_image
    hits = sum(query["hits"][0]["right"] for query in queries if query["hits"])
    name, searched = escape(humanize(gallery.name)), number(gallery.num_images)
    return (
        f"<h3>{name}: the nearest of {searched} pictures to a caption</h3>"
        f'<p class="note">{hits} of {len(queries)} first pictures are right.</p>'
        f'<div class="grid cards">{"".join(_query(gallery, query) for query in queries)}</div>'
        f"<h3>{name}: the nearest captions to a picture</h3>"
        '<p class="note">In each language the best caption, then the next two in grey.</p>'
        f'<div class="grid cards">{"".join(_card(gallery, card) for card in cards)}</div>'
    )
