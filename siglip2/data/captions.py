"""What data sets put where a caption belongs, as language -> caption."""

import json
from collections.abc import Mapping
from typing import Any

UNKNOWN_LANGUAGE = "und"
_CAPTION_KEYS = ("captions", "caption", "text")


def base_language(tag: str) -> str:
    """The tag without the private part that numbers several captions in one language."""
    return tag.split("-x-")[0]


def parse_captions(value: Any, language: str = UNKNOWN_LANGUAGE) -> dict[str, str]:
    """Language -> caption of a text, a list, a dictionary or its JSON; {} if there is none.

    Further captions in one language get a private tag: "en", "en-x-1", "en-x-2".
    """
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("{"):
            try:
                return parse_captions(json.loads(text), language)
            except json.JSONDecodeError:
                pass
        return {language: text} if text else {}
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for tag, inner in value.items():
            found |= parse_captions(inner, str(tag))
        return found
    if isinstance(value, list | tuple):
        texts = [text.strip() for text in value if isinstance(text, str) and text.strip()]
        return {f"{language}-x-{i}" if i else language: text for i, text in enumerate(texts)}
    return {}


def captions_of_record(record: Mapping[str, Any], caption_key: str | None = None) -> dict[str, str]:
    """Captions of a record or row: in `caption_key`, the usual keys, or caption_<language>."""
    language = str(record.get("language") or UNKNOWN_LANGUAGE)
    for key in (caption_key, *_CAPTION_KEYS):
        if key is not None and (found := parse_captions(record.get(key), language)):
            return found
    found = {}
    for key, value in record.items():
        if isinstance(key, str) and key.startswith("caption_"):
            found |= parse_captions(value, key.removeprefix("caption_").replace("_", "-"))
    return found
