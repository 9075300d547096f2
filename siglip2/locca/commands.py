"""`siglip2 caption` and `siglip2 locate`: what a trained decoder says of pictures."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.images import FixedTransform, NaflexTransform, decode_image
from ..data.tokenizer import get_tokenizer
from ..data.types import BadSampleError
from ..errors import CheckpointError, ConfigError, DataError, require
from ..models.decoder import Decoder
from ..models.factory import from_pretrained
from ..models.inputs import vision_inputs
from ..models.siglip2 import Siglip2
from .files import load_decoder
from .generate import generate
from .tasks import Box, Task, prompts, text_to_box


class Speaker(NamedTuple):
    """A model, and all that it takes to ask it."""

    model: Siglip2
    decoder: Decoder
    tokenizer: Any
    transform: FixedTransform | NaflexTransform


def caption(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Print "image: caption" for each image."""
    parser.add_argument("image", nargs="+", help="picture file")
    _add_options(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: need at least 1; got {args.batch_size}")
    speaker = load_speaker(args.model, args.tokenizer, device=args.device)
    options = _draws(args, speaker.model.device)
    for start in range(0, len(args.image), args.batch_size):
        files = args.image[start : start + args.batch_size]
        pictures = [_read(file) for file in files]
        texts = answer(speaker, pictures, "caption", [""] * len(files), names=files, **options)
        for file, text in zip(files, texts, strict=True):
            print(f"{file}: {text}")


def locate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Print the box of a phrase in pixels, and draw it."""
    parser.add_argument("image", help="picture file")
    parser.add_argument("phrase", help="what to look for")
    parser.add_argument("--out", help="PNG to draw the box into; default: IMAGE-located.png here")
    _add_options(parser)
    args = parser.parse_args(argv)
    out = Path(args.out or f"{Path(args.image).stem}-located.png")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out: need a name that ends in .png; got {str(out)!r}")
    if not args.phrase.strip():
        raise ConfigError("need a phrase to look for; got an empty one")
    speaker = load_speaker(args.model, args.tokenizer, device=args.device)
    picture, files = _read(args.image), [args.image]
    options = _draws(args, speaker.model.device)
    [text] = answer(speaker, [picture], "refer", [args.phrase], names=files, **options)
    box = text_to_box(text, speaker.decoder.config.max_coordinate)
    if box is None:
        raise DataError(
            f"{args.image}: need four numbers that are a box; the decoder said {text!r}."
            " It may not know the phrase; --temperature 1 --seed N draws other answers"
        )
    x0, y0, x1, y1 = _draw(picture, box, out)
    print(f"{args.image}: {args.phrase}: {x0} {y0} {x1} {y1}")
    print(f"wrote {out}")


def load_speaker(
    where: str | Path,
    tokenizer: str | None = None,
    *,
    device: torch.device | str | None = None,
) -> Speaker:
    """A model's folder, or a run's, with its decoder and tokenizer.

    Activations are bfloat16 on a GPU, float32 elsewhere.

    Raises CheckpointError when the folder has no decoder or one of another model, TextError
    without a tokenizer.
    """
    path = Path(where)
    path = path / "export" if (path / "export").is_dir() else path
    device = _device(device)
    decoder = load_decoder(path, device=device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = from_pretrained(path, dtype=dtype, device=device)
    vision, config = model.architecture.vision, decoder.config
    if config.vision_width != vision.size.width:
        raise CheckpointError(
            f"{path}: need a decoder of {vision.size.width} wide vision tokens; decoder.json is of"
            f" {config.vision_width}. The two files are of different models"
        )
    found = get_tokenizer(tokenizer or path, text_length=config.length)
    if found.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path}: need the decoder's tokenizer, of {config.vocab_size} words; got one of"
            f" {found.vocab_size}. Pass --tokenizer"
        )
    budget = vision.grid_size**2
    transform = (
        NaflexTransform(vision.patch_size, budget)
        if vision.is_naflex
        else FixedTransform(vision.image_size)
    )
    return Speaker(model, decoder, found, transform)


@torch.no_grad()
def answer(
    speaker: Speaker,
    pictures: Sequence[bytes],  # encoded
    task: Task,
    given: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[str]:
    """What the decoder says of each picture, after what is given of its text.

    Args:
        given: As for `siglip2.locca.tasks.prompts`.
        names: Of the pictures, for errors.
        options: Of `siglip2.locca.generate.generate`.

    Raises BadSampleError for what is no picture, ConfigError for a wrong option or a long prompt.
    """
    model, decoder, tokenizer, transform = speaker
    prepared = []
    for number, picture in enumerate(pictures):
        try:
            prepared.append(transform.prepare(picture))
        except BadSampleError as error:
            name = names[number] if names else f"picture {number}"
            raise BadSampleError(error.reason, name) from None
    inputs = vision_inputs(transform.collate(prepared), model.architecture.vision, model.device)
    tokens = model.vision(*inputs, model.dtype).tokens
    lengths = inputs.grid_hw.prod(1).tolist()
    asked = prompts(task, given, tokenizer)
    try:
        texts = generate(decoder, tokens, lengths, asked, eos_id=tokenizer.eos_id, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [tokenizer.decode(ids) for ids in texts]


def _draws(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Options of `generate`; the draws of one call go on where those before it ended."""
    generator = torch.Generator(device).manual_seed(args.seed)
    return {"temperature": args.temperature, "top_p": args.top_p, "generator": generator}


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"need a device of this machine; got {str(name)!r}: {reason}") from None
    return torch.device(name)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model or run folder with a decoder")
    parser.add_argument("--tokenizer", help="default: the model folder's own")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest alone")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--device", help="default: cuda where there is one")


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"need a picture file; cannot read {file}: {error.strerror}") from None


def _draw(picture: bytes, box: Box, out: Path) -> tuple[int, ...]:  # x0, y0, x1, y1 in pixels
    pen = require("PIL.ImageDraw", "data")
    image = decode_image(picture)
    sides = (image.width, image.height) * 2
    pixels = tuple(round(share * side) for share, side in zip(box, sides, strict=True))
    pen.Draw(image).rectangle(pixels, outline=(230, 30, 30), width=max(1, min(image.size) // 100))
    beside = out.with_name(f".{out.name}.partial")
    image.save(beside, "PNG")
    os.replace(beside, out)
    return pixels
