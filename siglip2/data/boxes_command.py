"""`siglip2 data boxes`: pseudo-labels for regions, by the detector the user names."""

import argparse
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from siglip2.config import DataConfig
from siglip2.data.detect import BoxOptions, Detect
from siglip2.data.region_shards import write_region_shards
from siglip2.data.sources import open_source
from siglip2.errors import ConfigError, DataError

_DETECTOR = "need the folder of an OWLv2 model, or MODULE:CALLABLE of detect(image, phrases)"


def add_options(parser: argparse.ArgumentParser) -> None:
    defaults = BoxOptions()
    parser.add_argument("source", help="as for --data.train")
    parser.add_argument("out", help="folder for the tars; a folder begun before is gone on with")
    parser.add_argument(
        "--detector",
        required=True,
        help="folder of an OWLv2 model (transformers), or module:callable, called with an RGB"
        " picture and phrases for (phrase index, score, (x0, y0, x1, y1) in pixels) of each find",
    )
    parser.add_argument(
        "--max-words",
        type=int,
        default=defaults.most_words,
        help="of the longest n-gram of a caption; 0: categories alone (default %(default)s)",
    )
    parser.add_argument(
        "--languages", help="n-grams of captions in these alone, such as en,de; default: all"
    )
    parser.add_argument("--categories", help="text file, a category a line, to find in every image")
    parser.add_argument("--threshold", type=float, default=defaults.threshold)
    parser.add_argument(
        "--overlap",
        type=float,
        default=defaults.most_overlap,
        help="IoU from which the better of two boxes of one phrase is kept (default %(default)s)",
    )
    parser.add_argument(
        "--max-boxes", type=int, default=defaults.most_boxes, help="an image (default %(default)s)"
    )
    parser.add_argument("--prompt", default="{}", help='OWLv2: such as "a photo of a {}"')
    parser.add_argument("--device", help="OWLv2: default cuda where there is one")
    parser.add_argument("--examples-per-shard", type=int, default=1000)
    parser.add_argument(
        "--part", default="0/1", help="i/n: shards i, i + n, ... alone; run n of them at once"
    )
    parser.add_argument("--image-column", default=DataConfig.image_column, help="of tables and HF")
    parser.add_argument("--caption-column", default=DataConfig.caption_column)


def boxes(args: argparse.Namespace) -> str:
    """Writes the tars; a line that says what is in them. Raises ConfigError, DataError."""
    options = BoxOptions(
        most_words=args.max_words,
        languages=tuple(filter(None, (args.languages or "").split(","))),
        categories=read_categories(args.categories) if args.categories else (),
        threshold=args.threshold,
        most_overlap=args.overlap,
        most_boxes=args.max_boxes,
    )
    part = _part(args.part)
    config = replace(
        DataConfig(), image_column=args.image_column, caption_column=args.caption_column
    )
    source = open_source(args.source, config)
    detect = load_detector(
        args.detector, prompt=args.prompt, threshold=args.threshold, device=args.device
    )
    report = write_region_shards(
        source,
        Path(args.out).expanduser(),
        detect,
        options,
        detector=args.detector if args.prompt == "{}" else f"{args.detector} ({args.prompt})",
        source_name=args.source,
        examples_per_shard=args.examples_per_shard,
        part=part,
    )
    return str(report)


def read_categories(path: str) -> tuple[str, ...]:
    """Lines of a text file, each once, without those that are empty or begin with #."""
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"need a text file with a category a line; {path}: {error}") from None
    found = (line.strip() for line in lines)
    categories = tuple(dict.fromkeys(x for x in found if x and not x.startswith("#")))
    if not categories:
        raise DataError(f"need a text file with a category a line; {path} has none")
    return categories


def load_detector(
    spec: str, *, prompt: str = "{}", threshold: float = 0.0, device: str | None = None
) -> Detect:
    """A callable by its name, from what is installed or here; or OWLv2 from its folder."""
    if Path(spec).expanduser().is_dir():
        from siglip2.data.owlv2 import Owlv2

        folder = Path(spec).expanduser()
        return Owlv2(folder, prompt=prompt, threshold=threshold, device=device)
    if prompt != "{}" or device is not None:
        raise ConfigError(f"--prompt and --device are of OWLv2; --detector is {spec!r}")
    module, colon, name = spec.partition(":")
    if not colon or not name or os.sep in module:
        raise ConfigError(f"--detector: {_DETECTOR}; got {spec!r}")
    try:
        detect = getattr(_import(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--detector: {_DETECTOR}; {spec!r}: {error}") from None
    except AttributeError:
        raise ConfigError(f"--detector: {_DETECTOR}; {module!r} has no {name!r}") from None
    if not callable(detect):
        raise ConfigError(f"--detector: {_DETECTOR}; {spec!r} cannot be called")
    return detect


def _import(module: str) -> ModuleType:
    """From what is installed, else from the current folder.

    That one is on the path for this import alone: in a checkout of this project it has a folder
    `kernels`, which transformers would take for Hugging Face's package.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(here)


def _part(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        raise ConfigError(f"--part: need i/n, such as 0/8; got {text!r}") from None
    return i, n
