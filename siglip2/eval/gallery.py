"""Pictures nearest to captions and captions nearest to pictures, drawn at random, to look at.

A gallery is a JSON file and thumbnails in the run's folder: a report is made of these files alone.
"""

import io
import json
import os
import random
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from siglip2.errors import DataError, require
from siglip2.eval.embed import (
    EmbeddedImages,
    TextTable,
    embed_images,
    embed_texts,
    inference,
    text_groups,
)
from siglip2.eval.zero_shot import Tokenizer
from siglip2.models.siglip2 import Siglip2

FOLDER = "gallery"
THUMBNAIL_PX = 144  # twice the size shown, for dense screens
_SEED = 0
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese"}  # else the Unicode name's
_SAME_SCORE = 1e-5  # one picture stored twice, under two sets of languages, scores alike


class Gallery(NamedTuple):
    """What to show of one source; `pictures` are WebP thumbnails by example key."""

    name: str
    num_images: int
    num_texts: dict[str, int]  # language -> distinct captions searched
    by_caption: list[dict[str, Any]]  # language, script, text, hits: [{key, caption, right}]
    by_image: list[dict[str, Any]]  # key, caption, languages: {tag: [{text, right}]}
    pictures: dict[str, bytes]

    def save(self, run_dir: str | Path) -> Path:
        """Write `gallery/<name>.json` and its thumbnails; an earlier gallery of the name is replaced."""
        root = Path(run_dir) / FOLDER
        stem = re.sub(r"[^\w.-]+", "_", self.name).lstrip(".") or "source"
        shutil.rmtree(root / stem, ignore_errors=True)
        (root / stem).mkdir(parents=True)
        files = {}
        for number, (key, data) in enumerate(self.pictures.items()):
            files[key] = f"{stem}/{number:03d}.webp"
            (root / files[key]).write_bytes(data)
        text = json.dumps({**self._asdict(), "pictures": files}, ensure_ascii=False, indent=1)
        beside = root / f".{stem}.json.partial"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, root / f"{stem}.json")
        return root / f"{stem}.json"


def load_galleries(run_dir: str | Path) -> list[Gallery]:
    """The galleries saved in a run's folder, by name. Raises DataError for a damaged one."""
    found = []
    for path in sorted((Path(run_dir) / FOLDER).glob("*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            files = fields["pictures"].items()
            fields["pictures"] = {key: (path.parent / file).read_bytes() for key, file in files}
            found.append(Gallery(**fields))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(
                f"cannot read the gallery {path} ({error}): run the evaluation again"
            ) from error
    return found


def script_of(texts: Iterable[str]) -> str:
    """The writing system most letters belong to; "Japanese" as soon as there is kana."""
    counts: Counter[str] = Counter()
    for text in texts:
        for character in filter(str.isalpha, text):
            word = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
            counts[_SCRIPTS.get(word, word.capitalize())] += 1
    if counts["Japanese"]:
        return "Japanese"
    return counts.most_common(1)[0][0] if counts else "Unknown"


def choose_languages(
    captions: Sequence[Mapping[str, str]], *, limit: int
) -> dict[str, str]:  # language -> script
    """Well covered languages, each script's best covered first, then second ones of a script."""
    counts = Counter(language for caption in captions for language in caption)
    most = max(counts.values(), default=0)
    order = sorted(
        (x for x in counts if 2 * counts[x] >= most), key=lambda x: (x != "en", -counts[x], x)
    )
    scripts = {x: script_of(c[x] for c in captions[:300] if x in c) for x in order}
    firsts = {script: language for language, script in reversed(scripts.items())}
    ranked = sorted(order, key=lambda x: (firsts[scripts[x]] != x, order.index(x)))
    return {language: scripts[language] for language in ranked[:limit]}


def thumbnail(data: bytes) -> bytes:
    """A WebP picture of at most THUMBNAIL_PX a side; transparency is kept."""
    require("PIL", "data")
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=85)
    return out.getvalue()


def _label(captions: Mapping[str, str], language: str) -> str:
    return captions.get(language) or captions.get("en") or next(iter(captions.values()), "")


def _nearest_images(
    score: Tensor,  # (N,)
    found: EmbeddedImages,
    *,
    groups: set[str],
    language: str,
    k: int,
) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = []
    shown: dict[tuple[str, str], float] = {}
    for row in score.argsort(descending=True)[: 4 * k].tolist():
        what, value = (found.groups[row], found.subsets[row]), float(score[row])
        if what in shown and abs(shown[what] - value) < _SAME_SCORE:
            continue
        shown[what] = value
        label = _label(found.captions[row], language)
        hits.append({"key": found.keys[row], "caption": label, "right": what[0] in groups})
    return hits[:k]


def _by_caption(
    found: EmbeddedImages,
    texts: TextTable,
    tables: dict[str, dict[str, set[str]]],
    scripts: dict[str, str],
    *,
    per_language: int,
    k: int,
) -> list[dict[str, Any]]:
    """Random captions of each language; no group is asked for twice while others are left."""
    rng, used, queries = random.Random(_SEED), set[str](), []
    for language, script in scripts.items():
        order = rng.sample(list(tables[language]), len(tables[language]))
        order.sort(key=lambda text: not used.isdisjoint(tables[language][text]))
        for text in order[:per_language]:
            groups = tables[language][text]
            used |= groups
            score = found.img @ texts.rows([text])[0]
            hits = _nearest_images(score, found, groups=groups, language=language, k=k)
            queries.append({"language": language, "script": script, "text": text, "hits": hits})
    return queries


def _by_image(
    found: EmbeddedImages,
    texts: TextTable,
    tables: dict[str, dict[str, set[str]]],
    *,
    num_images: int,
    k: int,
) -> list[dict[str, Any]]:
    """Random images of distinct groups that have a caption in the first language."""
    first, rng, chosen = next(iter(tables)), random.Random(_SEED + 1), {}
    for row in rng.sample(range(len(found.keys)), len(found.keys)):
        if first in found.captions[row] and len(chosen) < num_images:
            chosen.setdefault(found.groups[row], row)
    out = []
    for group, row in chosen.items():
        languages = {}
        for language, table in tables.items():
            names = list(table)
            top = (texts.rows(names) @ found.img[row]).topk(min(k, len(names))).indices.tolist()
            languages[language] = [
                {"text": names[i], "right": group in table[names[i]]} for i in top
            ]
        label = _label(found.captions[row], first)
        out.append({"key": found.keys[row], "caption": label, "languages": languages})
    return out


def collect_gallery(
    model: Siglip2,
    source: Any,
    transform: Any,
    tokenizer: Tokenizer,
    *,
    name: str,
    batch_size: int = 256,
    max_images: int | None = 2000,
    max_languages: int = 8,
    queries_per_language: int = 2,
    num_images: int = 6,
    num_hits: int = 6,
) -> Gallery:
    """Random queries of a source, in languages of several scripts, and what the model finds for them.

    The draw has a fixed seed and does not look at the answers. Raises DataError for an empty source.
    """
    from siglip2.data import EvalLoader

    with inference(model):
        loader = EvalLoader(source, transform, batch_size=batch_size, max_images=max_images)
        found = embed_images(model, loader)
        scripts = choose_languages(found.captions, limit=max_languages)
        if not scripts:
            raise DataError(f"no picture with a caption to show in source {name!r}")
        wanted = [{x: c[x] for x in scripts if x in c} for c in found.captions]
        texts = embed_texts(model, wanted, tokenizer, batch_size=batch_size)
        tables = {x: text_groups(found.captions, found.groups, x) for x in scripts}
        by_caption = _by_caption(
            found, texts, tables, scripts, per_language=queries_per_language, k=num_hits
        )
        by_image = _by_image(found, texts, tables, num_images=num_images, k=3)
    keys = {hit["key"] for query in by_caption for hit in query["hits"]}
    keys |= {card["key"] for card in by_image}
    pictures = {x.key: thumbnail(x.image) for x in source if x.key in keys}
    num_texts = {language: len(table) for language, table in tables.items()}
    return Gallery(name, len(found.keys), num_texts, by_caption, by_image, pictures)
