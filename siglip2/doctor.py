"""`siglip2 doctor`: the traps that silently cost accuracy, checked on a user's own files."""

from collections.abc import Iterator
from pathlib import Path

from .data.tokenizer import check_tokenizer, get_tokenizer
from .errors import Siglip2Error
from .models.factory import from_pretrained
from .models.siglip2 import Siglip2


def diagnose(where: str, *, text_length: int | None = None) -> int:
    """Print one line a check; return 1 if any failed.

    Args:
        where: A model folder or file, a tokenizer file, or a hub id.
        text_length: None takes the model's, or 64 where only a tokenizer is given.
    """
    failed = 0
    for name, fault in _checks(where, text_length):
        print(f"{'FAILED' if fault else 'ok    '} {name}{': ' + fault if fault else ''}")
        failed |= fault is not None
    return failed


def _checks(where: str, text_length: int | None) -> Iterator[tuple[str, str | None]]:
    path = Path(where)
    if not (path.is_file() and path.suffix in (".json", ".model")):
        try:
            model = from_pretrained(where)
        except Siglip2Error as error:
            yield "weights load strictly", str(error)
        else:
            yield "weights load strictly", None
            yield "trained temperature", _temperature(model)
            text_length = text_length or model.architecture.text.length
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        yield "text", "no tokenizer.json in the folder: pass one with --data.tokenizer"
    elif path.suffix not in (".npz", ".safetensors", ".bin", ".pt"):
        yield "text: lower-cased, no BOS, one EOS, padded right", _text(where, text_length or 64)


def _temperature(model: Siglip2) -> str | None:
    scale = float(model.log_scale.detach().exp())
    if scale > 1.5:
        return None
    return (
        f"exp(logit_scale) is {scale:.2f}, as in an untrained transformers model;"
        " train with model.init_temperature=10"
    )


def _text(where: str, text_length: int) -> str | None:
    try:
        check_tokenizer(get_tokenizer(where, text_length=text_length), text_length)
    except Siglip2Error as error:
        return str(error)
    return None
