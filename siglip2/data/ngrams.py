"""Runs of words in a caption: what an open-vocabulary detector is asked to find."""

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from siglip2.data.captions import UNKNOWN_LANGUAGE, base_language
from siglip2.data.stop_words import STOP_WORDS

_INNER = "'\u2019-\u2010\u00b7"  # of a word: o'clock, t-shirt
_HAN, _KANA, _KATAKANA, _OTHER = "CJK", "HIRAGANA", "KATAKANA", ""


class _Word(NamedTuple):
    start: int
    end: int  # behind it
    script: str


def ngrams(text: str, language: str = UNKNOWN_LANGUAGE, *, most_words: int = 10) -> list[str]:
    """Every run of 1 to `most_words` words as it stands in the caption, in its order, once.

    A run does not cross punctuation, does not begin or end with a stop word and has a letter in
    it; texts that differ in case alone are one. Stop words are of the caption's language, English
    ones where it is not said; a language without a list has none.

    Scripts without spaces: a Han character is a word, a stretch of katakana is a word, a stretch of
    hiragana is a word that no run begins or ends with (particles and endings); runs are written
    without spaces. Thai, Lao, Khmer and Burmese are cut at their spaces alone.
    """
    language = base_language(language).split("-")[0].lower()
    stop_words = STOP_WORDS.get("en" if language == UNKNOWN_LANGUAGE else language, frozenset())
    found: dict[str, str] = {}
    for words in _stretches(text):
        at_end = [_can_end(text[w.start : w.end], w.script, stop_words) for w in words]
        for first, word in enumerate(words):
            for last in range(first, min(first + most_words, len(words))):
                run = text[word.start : words[last].end]
                if at_end[first] and at_end[last] and any(map(str.isalpha, run)):
                    run = " ".join(run.split())
                    found.setdefault(run.casefold(), run)
    return list(found.values())


def _can_end(word: str, script: str, stop_words: frozenset[str]) -> bool:
    return script != _KANA and word.casefold().replace("\u2019", "'") not in stop_words


def _stretches(text: str) -> Iterator[list[_Word]]:
    """Words with nothing but white space between them."""
    stretch: list[_Word] = []
    for word in _words(text):
        if stretch and text[stretch[-1].end : word.start].strip():
            yield stretch
            stretch = []
        stretch.append(word)
    if stretch:
        yield stretch


def _words(text: str) -> Iterator[_Word]:
    cuts = [0, *(i for i in range(1, len(text)) if _is_cut(text, i)), len(text)]
    for start, end in pairwise(cuts):
        if end > start and _is_inner(text, start):
            yield _Word(start, end, _script(text[start]))


def _is_cut(text: str, i: int) -> bool:
    """Whether characters i - 1 and i are of different words, or one of them of none."""
    before, after = text[i - 1], text[i]
    if not (_is_inner(text, i - 1) and _is_inner(text, i)):
        return True
    if unicodedata.category(after).startswith("M") or after in _INNER or before in _INNER:
        return False
    script = _script(after)
    return script == _HAN or script != _script(before)


def _is_inner(text: str, i: int) -> bool:
    """A letter, mark or digit, or what joins two of them."""
    if unicodedata.category(text[i])[0] in "LMN":
        return True
    joined = text[i] in _INNER and 0 < i < len(text) - 1
    return joined and text[i - 1].isalnum() and text[i + 1].isalnum()


def _script(character: str) -> str:
    if character.isascii():
        return _OTHER
    if character == "\u30fc":  # the long vowel of katakana, though its name does not say so
        return _KATAKANA
    name = unicodedata.name(character, "")
    return next((s for s in (_HAN, _KANA, _KATAKANA) if name.startswith(s)), _OTHER)
