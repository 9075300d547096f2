"""Captions to ids as SigLIP 2 was trained: lower-cased, no BOS, one EOS, right-padded with 0."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from siglip2.errors import TextError, require

PAD_ID, EOS_ID = 0, 1
_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # Gemma's first five ids
_NEEDS = (
    f"SigLIP 2 needs lower-cased text, no BOS, one EOS (id {EOS_ID}) that survives truncation and "
    f"padding on the right with id {PAD_ID}"
)


class _Backend(Protocol):
    file_name: str

    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int]) -> str: ...
    def id_of(self, token: str) -> int | None: ...
    def size(self) -> int: ...
    def write(self, path: Path) -> None: ...


class _JsonBackend:
    """A tokenizer.json; its own padding, truncation and post-processing are switched off."""

    file_name = "tokenizer.json"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "<eos>" in a caption is text, not the end

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def write(self, path: Path) -> None:
        self.tokenizer.save(str(path))


class _SentencePieceBackend:
    file_name = "tokenizer.model"

    def __init__(self, processor: Any):
        self.processor = processor

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, add_bos=False, add_eos=False)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def id_of(self, token: str) -> int | None:
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None

    def size(self) -> int:
        return self.processor.get_piece_size()

    def write(self, path: Path) -> None:
        path.write_bytes(self.processor.serialized_model_proto())


class Siglip2Tokenizer:
    """Texts -> ids (B, text_length) int64.

    Raises TextError if the vocabulary does not have <pad> at 0 and <eos> (or </s>) at 1.
    """

    pad_id = PAD_ID
    eos_id = EOS_ID

    def __init__(self, backend: _Backend, *, text_length: int = 64, name: str = "tokenizer"):
        if text_length < 2:
            raise TextError(f"text_length must be at least 2 (a token and EOS); got {text_length}")
        self._backend = backend
        self.text_length = text_length
        self.vocab_size = backend.size()
        self.bos_id = _first_of(backend, "<bos>", "<s>")
        pad, eos = _first_of(backend, "<pad>"), _first_of(backend, "<eos>", "</s>")
        if (pad, eos) != (PAD_ID, EOS_ID):
            raise TextError(
                f"{name} has <pad> at {pad} and <eos> at {eos}; SigLIP 2 needs {PAD_ID} and "
                f"{EOS_ID}. Use Gemma's vocabulary, or train one with siglip2.data.train_tokenizer."
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with EOS, not padded, at most text_length of them."""
        room = self.text_length - 1
        encoded = self._backend.encode([text.lower() for text in texts])
        return [[*ids[:room], EOS_ID] for ids in encoded]

    def __call__(self, texts: str | Sequence[str]) -> Tensor:  # (B, L) int64
        texts = [texts] if isinstance(texts, str) else list(texts)
        out = torch.full((len(texts), self.text_length), PAD_ID, dtype=torch.int64)
        for row, ids in zip(out, self.encode(texts), strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return out

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """Text of one row of ids, up to its first EOS or padding."""
        kept: list[int] = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i in (PAD_ID, EOS_ID):
                break
            kept.append(int(i))
        return self._backend.decode(kept)

    def save(self, folder: str | Path) -> Path:
        """Write the vocabulary so that get_tokenizer(folder) reads it back; returns the file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self._backend.file_name
        self._backend.write(path)
        return path


class WrappedTokenizer:
    """Somebody else's tokenizer as a callable list[str] -> ids (B, text_length) int64."""

    pad_id = PAD_ID
    eos_id = EOS_ID

    def __init__(self, tokenizer: Callable[..., Any], *, text_length: int = 64):
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.vocab_size = _length_of(tokenizer)
        self.bos_id = getattr(tokenizer, "bos_token_id", None)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:  # (B, L) int64
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not hasattr(self.tokenizer, "padding_side"):
            return torch.as_tensor(self.tokenizer(texts), dtype=torch.int64)
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.text_length
        )["input_ids"]
        return torch.as_tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: str | Path) -> Path:
        self.tokenizer.save_pretrained(folder)
        return Path(folder)


def _length_of(tokenizer: Any) -> int | None:
    try:
        return len(tokenizer)
    except TypeError:
        return getattr(tokenizer, "vocab_size", None)


def _first_of(backend: _Backend, *tokens: str) -> int | None:
    return next((i for i in map(backend.id_of, tokens) if i is not None), None)


def _last_token(row: list[int]) -> int:
    """The last id before the padding (the trailing run of one repeated id)."""
    end = len(row) - 1
    while end > 0 and row[end] == row[-1] and row[end - 1] == row[-1]:
        end -= 1
    return row[end - 1] if end > 0 else row[0]


def check_tokenizer(tokenizer: Callable[[list[str]], Any], text_length: int = 64) -> None:
    """Look at the ids a tokenizer makes of a few probes; TextError names every fault found."""
    probes = ["", "a", "b", "A", "one cat and two dogs " * text_length]
    ids = torch.as_tensor(tokenizer(probes))
    if ids.shape != (len(probes), text_length):
        raise TextError(
            f"need ids ({len(probes)}, {text_length}) for {len(probes)} texts; "
            f"got {tuple(ids.shape)}: pad and truncate to text_length {text_length}"
        )
    empty, a, b, upper, long = ids.tolist()
    faults = []
    if a[0] == a[1] and a[-1] != a[-2]:
        faults.append("pads on the left (set padding_side='right')")
    else:
        if a[-1] != PAD_ID:
            faults.append(f"pads with id {a[-1]} (need {PAD_ID})")
        if empty[0] not in (PAD_ID, EOS_ID, a[-1]):
            faults.append(f"adds BOS (id {empty[0]})")
        if a[-1] == EOS_ID:  # padded with EOS: nothing to tell the two apart by
            pass
        elif _last_token(a) != _last_token(b):
            faults.append("adds no EOS")
        elif _last_token(a) != EOS_ID:
            faults.append(f"ends texts with id {_last_token(a)} (EOS must be {EOS_ID})")
        elif long[-1] != EOS_ID:
            faults.append("cuts EOS off long texts")
    if upper != a:
        faults.append("does not lower-case")
    if faults:
        raise TextError(
            f"tokenizer {', '.join(faults)}; {_NEEDS}. Use siglip2.get_tokenizer on its "
            "tokenizer.json or .model file, or strict=False."
        )


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".json", ".model")):
        raise TextError(f"no tokenizer file {name!r}: need a tokenizer.json, .model or a folder")
    hub = require("huggingface_hub", "hub")
    try:
        return Path(hub.hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # the hub's client raises dozens of network and naming errors
        raise TextError(
            f"no tokenizer at {name!r}: it is no file or folder here, and the hub did not give "
            f"its tokenizer.json ({type(error).__name__}). Give the path of a tokenizer.json or "
            "SentencePiece .model."
        ) from error


def _find_file(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        for found in (path / "tokenizer.json", path / "tokenizer.model"):
            if found.is_file():
                return found
        raise TextError(f"folder {str(name)!r} has neither tokenizer.json nor tokenizer.model")
    return path if path.is_file() else _from_hub(str(name))


def _load_backend(path: Path) -> _Backend:
    if path.suffix == ".model":
        spm = require("sentencepiece", "text")
        try:
            return _SentencePieceBackend(spm.SentencePieceProcessor(model_file=str(path)))
        except (OSError, RuntimeError) as error:
            raise TextError(f"{path} is not a SentencePiece model: {error}") from error
    tokenizers = require("tokenizers", "text")
    try:
        return _JsonBackend(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise TextError(f"{path} is not a tokenizer.json: {error}") from error


def get_tokenizer(
    name_or_path: str | Path | Callable[..., Any], *, text_length: int = 64, strict: bool = True
) -> Siglip2Tokenizer | WrappedTokenizer:
    """A tokenizer.json, a SentencePiece .model, a folder with either, a hub id, or a callable.

    Files are read so that the rules hold whatever they say. A callable (transformers tokenizer, or
    list[str] -> ids) is used as it is, and refused with TextError if its ids break the rules,
    unless `strict` is False.
    """
    if isinstance(name_or_path, Siglip2Tokenizer):
        return Siglip2Tokenizer(name_or_path._backend, text_length=text_length)
    if callable(name_or_path):
        tokenizer = WrappedTokenizer(name_or_path, text_length=text_length)
        if strict:
            check_tokenizer(tokenizer, text_length)
        return tokenizer
    path = _find_file(name_or_path)
    return Siglip2Tokenizer(_load_backend(path), text_length=text_length, name=str(path))
