"""Emoji and flags as named concepts: which there are, which are alike, what languages call them."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from siglip2.errors import DataError, require

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_HAIR = {chr(code) for code in range(0x1F9B0, 0x1F9B4)}
# Joiner, variation selector, gender signs, arrow of the "facing right" variants.
_GLUE = {"\u200d", "\ufe0f", "\u2640", "\u2642", "\u27a1"}
_PEOPLE = {chr(c) for c in (0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F9D1, 0x1F9D2)}
_PEOPLE_WORDS = {"man", "men", "woman", "women", "person", "people"}
_DIRECTIONS = {"facing", "left", "right", "up", "down"}
_SETS = {"keycap", "family"}  # first words of names that form one family
# A word that ends more names than this ("face", "button") says little about likeness.
_COMMON_HEAD = 24
_FULLY_QUALIFIED = 2  # in emoji.STATUS
_MIN_TERRITORIES = 200  # a language of babel's that names fewer countries is left out
_MIN_COVERAGE = 0.9  # a CLDR language that names fewer of the concepts is left out


@dataclass(frozen=True)
class Concept:
    emoji: str
    names: Mapping[str, str]  # language -> name
    extra_names: Mapping[str, str]  # of flags only, in languages that name nothing else
    family: str  # concepts of one family are never split between training and evaluation
    group: str  # concepts drawn alike (the flags of Norway and Svalbard) are one group

    @property
    def codepoints(self) -> str:
        return codepoints(self.emoji)


def codepoints(emoji: str) -> str:
    return "-".join(f"{ord(char):x}" for char in emoji)


def is_flag(emoji: str) -> bool:
    """A country's or region's flag: two regional letters, or a black flag with tag letters."""
    return 0x1F1E6 <= ord(emoji[0]) <= 0x1F1FF or "\U000e007f" in emoji


def _look(emoji: str) -> str:
    """An emoji without skin, hair, gender, direction and the person that carries it."""
    rest = "".join(c for c in emoji if c not in _GLUE | _SKIN_TONES | _HAIR) or emoji
    return "".join(c for c in rest if c not in _PEOPLE) or "people"


def _words(english: str) -> list[str]:
    words = english.lower().replace("-", " ").replace(":", " ").split()
    return [w for w in words if w not in _PEOPLE_WORDS | _DIRECTIONS] or ["people"]


def families(english: Mapping[str, str], pictures: Mapping[str, bytes]) -> dict[str, str]:
    """Emoji -> the first emoji of its family.

    Two concepts are kin if they differ by skin, gender, direction or person only, if their names
    differ by such words only, if they share a head word that is not common, or if they are drawn
    the same. A flag is kin only of flags drawn the same.
    """
    parent = {emoji: emoji for emoji in english}

    def root(emoji: str) -> str:
        while parent[emoji] != emoji:
            emoji = parent[emoji]
        return emoji

    things = {e: _words(name) for e, name in english.items() if not is_flag(e)}
    heads = Counter(words[-1] for words in things.values())
    kin = defaultdict(list)
    for emoji in english:
        kin["picture", pictures[emoji]].append(emoji)
    for emoji, words in things.items():
        kin["look", _look(emoji)].append(emoji)
        kin["name", " ".join(words)].append(emoji)
        if words[0] in _SETS:
            kin["set", words[0]].append(emoji)
        if heads[words[-1]] <= _COMMON_HEAD:
            kin["head", words[-1]].append(emoji)
    for first, *others in kin.values():
        for other in others:
            a, b = sorted((root(first), root(other)))
            parent[b] = a
    return {emoji: root(emoji) for emoji in english}


def base_emoji() -> dict[str, dict[str, str]]:
    """Emoji without skin tone -> language -> name, in the package's 14 languages."""
    package = require("emoji", "quickstart")
    for language in package.LANGUAGES:
        package.config.load_language(language)
    return {
        emoji: {lang: entry[lang].strip(":").replace("_", " ") for lang in package.LANGUAGES}
        for emoji, entry in sorted(package.EMOJI_DATA.items())
        if entry["status"] == _FULLY_QUALIFIED and not _SKIN_TONES & set(emoji)
    }


def country_names() -> dict[str, dict[str, str]]:
    """Flag -> language -> the country's name, in every language babel knows countries in."""
    require("babel", "quickstart")
    from babel import Locale, localedata

    names: dict[str, dict[str, str]] = defaultdict(dict)
    for identifier in sorted(localedata.locale_identifiers()):
        locale = Locale.parse(identifier)
        territories = dict(locale.territories)
        repeats = locale.script and territories == dict(Locale(locale.language).territories)
        if locale.territory or len(territories) < _MIN_TERRITORIES or repeats:
            continue
        for code, name in territories.items():
            if len(code) == 2 and code.isalpha():
                flag = "".join(chr(0x1F1E6 + ord(letter) - ord("A")) for letter in code)
                names[flag][identifier.replace("_", "-")] = name
    return dict(names)


def cldr_names(folder: str, emoji: Sequence[str]) -> dict[str, dict[str, str]]:
    """Emoji -> language -> name, from npm's cldr-annotations(-derived)-full in `folder`."""
    bare = {e.replace("\ufe0f", ""): e for e in emoji}
    by_language: dict[str, dict[str, str]] = defaultdict(dict)
    for package, kind in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        files = sorted((Path(folder) / package / kind).glob("*/annotations.json"))
        if not files:
            raise DataError(
                f"data.quickstart.cldr_dir needs {package}/{kind}/<language>/annotations.json; "
                f"{folder!r} has none. Unpack the npm packages cldr-annotations-full and "
                "cldr-annotations-derived-full there."
            )
        for file in files:
            entries = json.loads(file.read_text("utf-8"))[kind]["annotations"]
            found = by_language[file.parent.name]
            for key, entry in entries.items():
                whole = bare.get(key.replace("\ufe0f", ""))
                if whole and entry.get("tts"):
                    found[whole] = entry["tts"][0]
    names: dict[str, dict[str, str]] = {e: {} for e in emoji}
    for language, found in sorted(by_language.items()):
        if len(found) >= _MIN_COVERAGE * len(emoji):
            for e, name in found.items():
                names[e][language] = name
    return names


def all_concepts(pictures: Mapping[str, bytes], cldr_dir: str | None = None) -> list[Concept]:
    """Every base emoji in `pictures` (emoji -> a digest of its drawing), in code-point order."""
    named = {e: names for e, names in base_emoji().items() if e in pictures}
    if cldr_dir is not None:
        wider = cldr_names(cldr_dir, list(named))
        named = {e: {**wider[e], **names} for e, names in named.items()}
    countries = country_names()
    family = families({e: names["en"] for e, names in named.items()}, pictures)
    first_drawn: dict[bytes, str] = {}
    concepts = []
    for emoji, names in named.items():
        extra = {k: v for k, v in countries.get(emoji, {}).items() if k not in names}
        group = first_drawn.setdefault(pictures[emoji], codepoints(emoji))
        concepts.append(Concept(emoji, names, extra, family[emoji], group))
    return concepts


def split(
    concepts: Sequence[Concept], *, train: int | None, held_out: int
) -> tuple[list[Concept], list[Concept]]:
    """Training and held-out concepts: no family is in both, the choice is the same every time."""
    members = defaultdict(list)
    for concept in concepts:
        members[concept.family].append(concept)
    order = sorted(members)
    random.Random(0).shuffle(order)
    kept_out: list[Concept] = []
    kept: list[Concept] = []
    for family in order:
        fits = len(kept_out) + len(members[family]) <= held_out
        (kept_out if fits else kept).extend(members[family])
    return kept[:train], kept_out
