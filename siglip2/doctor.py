"""`siglip2 doctor`: the traps that silently cost accuracy, checked on a user's own files."""

from collections.abc import Iterator
from pathlib import Path

from .errors import Siglip2Error


def diagnose(where: str, *, text_length: int = 64) -> int:
    """Print one line a check; return 1 if any failed."""
    failed = 0
    for name, fault in _checks(where, text_length):
        print(
            f"{'ok    ' if fault is None else 'FAILED'} {name}"
            f"{'' if fault is None else ': ' + fault}"
        )
        failed |= fault is not None
    return failed


def _checks(where: str, text_length: int) -> Iterator[tuple[str, str | None]]:
    path = Path(where)
    is_tokenizer_file = path.is_file() and path.suffix in (".json", ".model")
    if not is_tokenizer_file:
        yield "weights load strictly", _try(lambda: _load(where))
    if is_tokenizer_file or not path.exists() or (path / "tokenizer.json").is_file():
        yield (
            "text: lower-cased, no BOS, one EOS, padded right with 0",
            _try(lambda: _tokenizer(where, text_length)),
        )
    elif path.is_dir():
        yield "text", "no tokenizer.json in the folder: pass one with --data.tokenizer"


def _try(check) -> str | None:
    try:
        return check()
    except Siglip2Error as error:
        return str(error)


def _load(where: str) -> str | None:
    from .models.factory import from_pretrained

    model = from_pretrained(where)
    scale = float(model.log_scale.detach().exp())
    if scale < 1.5:
        return (
            f"temperature exp(logit_scale) is {scale:.2f}: weights of an untrained transformers"
            " model; train with model.init_temperature=10"
        )
    return None


def _tokenizer(where: str, text_length: int) -> None:
    from .data.tokenizer import check_tokenizer, get_tokenizer

    check_tokenizer(get_tokenizer(where, text_length=text_length), text_length)
