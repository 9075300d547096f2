"""A small multilingual vocabulary trained on one's own captions."""

import json
from collections.abc import Iterable

from siglip2.data.tokenizer import _SPECIALS, Siglip2Tokenizer, _JsonBackend
from siglip2.errors import TextError, require

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "\u2581"


def _with_bytes(model: dict) -> dict:
    """The model with the 256 byte tokens put behind the specials, so that no text is unknown."""
    S = len(_SPECIALS)
    vocab = {token: i if i < S else i + len(_BYTES) for token, i in model["vocab"].items()}
    vocab |= {token: S + i for i, token in enumerate(_BYTES)}
    return {**model, "vocab": vocab, "byte_fallback": True, "unk_token": "<unk>"}


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int = 8192, text_length: int = 64
) -> Siglip2Tokenizer:
    """BPE with byte fallback over NFKC, lower-cased text; equal captions give equal vocabularies.

    The specials are Gemma's: <pad> 0, <eos> 1, <bos> 2, <unk> 3, <mask> 4. Few captions may give
    fewer ids than `vocab_size`.
    """
    least = len(_SPECIALS) + len(_BYTES) + 1
    if vocab_size < least:
        raise TextError(
            f"vocab_size must be at least {least} (specials and bytes); got {vocab_size}"
        )
    tokenizers = require("tokenizers", "text")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_BYTES),
        special_tokens=list(_SPECIALS),
        limit_alphabet=vocab_size // 2,
        show_progress=False,
    )
    # Sorted: the trainer breaks ties by the order in which it first meets a word.
    tokenizer.train_from_iterator(sorted(captions), trainer)
    state = json.loads(tokenizer.to_str())
    state["model"] = _with_bytes(state["model"])
    trained = tokenizers.Tokenizer.from_str(json.dumps(state))
    return Siglip2Tokenizer(_JsonBackend(trained), text_length=text_length)
