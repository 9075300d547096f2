"""Pictures nearest to captions and captions nearest to pictures, drawn at random, to look at.

A gallery is a JSON file and thumbnails in the run's folder: a report is made of these files alone.
"""

import hashlib
import io
import json
import random
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
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
    same_picture,
    text_groups,
)
from siglip2.eval.zero_shot import Tokenizer
from siglip2.files import write_atomic
from siglip2.models.siglip2 import Siglip2

FILE, THUMBNAILS = "gallery.json", "thumbnails"
THUMBNAIL_PX = 144  # twice the size shown, for dense screens
_SEED = 0
_PER_LANGUAGE, _HITS = 2, 6  # queries of each language, pictures shown for one
_IMAGES, _NAMES, _NAMING = 6, 3, 6  # pictures to name, names shown in each of so many languages
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese"}  # else the Unicode name's


class SourceGallery(NamedTuple):
    """What to show of one source; `pictures` are WebP thumbnails by example key."""

    name: str
    num_images: int
    num_texts: dict[str, int]  # language -> distinct captions searched
    by_caption: list[dict[str, Any]]  # language, script, text, hits: [{key, caption, right}]
    by_image: list[dict[str, Any]]  # key, caption, languages: {tag: [{text, right}]}
    pictures: dict[str, bytes]


class Gallery(NamedTuple):
    sources: list[SourceGallery]

    def save(self, folder: str | Path) -> Path:
        """Write gallery.json and thumbnails into `folder`, replacing the gallery it holds."""
        folder = Path(folder)
        shutil.rmtree(folder / THUMBNAILS, ignore_errors=True)
        (folder / THUMBNAILS).mkdir(parents=True)
        out = []
        for source in self.sources:
            files = {}
            for key, data in source.pictures.items():
                digest = hashlib.sha256(data).hexdigest()[:16]
                files[key] = f"{THUMBNAILS}/{digest}.webp"
                (folder / files[key]).write_bytes(data)
            out.append({**source._asdict(), "pictures": files})
        write_atomic(folder / FILE, json.dumps(out, ensure_ascii=False, indent=1))
        return folder / FILE


def load_gallery(folder: str | Path) -> Gallery:
    """The gallery saved in `folder`, empty if there is none. Raises DataError if it is damaged."""
    path = Path(folder) / FILE
    if not path.is_file():
        return Gallery([])
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))
        for fields in sources:
            files = fields["pictures"].items()
            fields["pictures"] = {key: (path.parent / file).read_bytes() for key, file in files}
        return Gallery([SourceGallery(**fields) for fields in sources])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"cannot read {path} ({error}): run the evaluation again") from error


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
    first: list[int],
    *,
    groups: set[str],
    language: str,
    k: int,
) -> list[dict[str, Any]]:
    rows = dict.fromkeys(first[row] for row in score.argsort(descending=True).tolist())
    return [
        {
            "key": found.keys[row],
            "caption": _label(found.captions[row], language),
            "right": found.groups[row] in groups,
        }
        for row in islice(rows, k)
    ]


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
    first = same_picture(found.img, found.groups)
    rng, used, queries = random.Random(_SEED), set[str](), []
    for language, script in scripts.items():
        order = rng.sample(list(tables[language]), len(tables[language]))
        order.sort(key=lambda text: not used.isdisjoint(tables[language][text]))
        for text in order[:per_language]:
            groups = tables[language][text]
            used |= groups
            score = found.img @ texts.rows([text])[0]
            hits = _nearest_images(score, found, first, groups=groups, language=language, k=k)
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


def _collect(
    model: Siglip2, loader: Any, tokenizer: Tokenizer, *, name: str, max_languages: int
) -> SourceGallery:
    """A source's gallery, its pictures still missing: their keys are there."""
    found = embed_images(model, loader)
    scripts = choose_languages(found.captions, limit=max_languages)
    if not scripts:
        raise DataError(f"no picture with a caption to show in source {name!r}")
    wanted = [{x: c[x] for x in scripts if x in c} for c in found.captions]
    texts = embed_texts(model, wanted, tokenizer, batch_size=loader.batch_size)
    tables = {x: text_groups(found.captions, found.groups, x) for x in scripts}
    by_caption = _by_caption(found, texts, tables, scripts, per_language=_PER_LANGUAGE, k=_HITS)
    naming = {language: tables[language] for language in [*tables][:_NAMING]}
    by_image = _by_image(found, texts, naming, num_images=_IMAGES, k=_NAMES)
    keys = {hit["key"] for query in by_caption for hit in query["hits"]}
    keys |= {card["key"] for card in by_image}
    num_texts = {language: len(table) for language, table in tables.items()}
    empty = dict.fromkeys(sorted(keys), b"")
    return SourceGallery(name, len(found.keys), num_texts, by_caption, by_image, empty)


def collect_gallery(
    model: Siglip2,
    sources: Mapping[str, Any],
    transform: Any,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 256,
    max_images: int | None = 2000,
    max_languages: int = 8,
) -> Gallery:
    """Random queries of each source, in languages of several scripts, and what the model finds.

    The draw has a fixed seed and does not look at the answers. Raises DataError for a source
    without a picture that has a caption.
    """
    from siglip2.data import EvalLoader
    from siglip2.data.sources import iterate
    from siglip2.data.types import Example

    out = []
    for name, source in sources.items():
        loader = EvalLoader(source, transform, batch_size=batch_size, max_images=max_images)
        with inference(model):
            part = _collect(model, loader, tokenizer, name=name, max_languages=max_languages)
        for example in iterate(source):
            if isinstance(example, Example) and example.key in part.pictures:
                part.pictures[example.key] = thumbnail(example.image)
        out.append(part)
    return Gallery(out)
