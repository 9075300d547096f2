"""`siglip2 COMMAND`: a thin table; each command parses its own options."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import ConfigError, Siglip2Error

COMMANDS = {
    "train": "train, evaluate and export a model (--dry-run --world-size N: count what it takes)",
    "eval": "zero-shot classification and retrieval of a model on a data set",
    "report": "write a run's report.html again, beside another run's numbers with --compare",
    "export": "write a model as hf, open_clip, timm or big_vision",
    "caption": "say what pictures show, with a decoder trained beside the towers",
    "locate": "find a phrase in a picture, print its box and draw it",
    "bench": "time the kernels beside their rivals",
    "data": "inspect a data source, build the default one, or find boxes for phrases",
    "config": "list presets, or show one as YAML",
    "doctor": "check a tokenizer and a model folder for known traps",
    "env": "versions, hardware, and which backend each op uses",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status.

    Errors a user can act on are one line, without a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="siglip2",
        description="Train SigLIP 2 in PyTorch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items())
        + "\n\nsiglip2 COMMAND --help lists a command's options",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    args = parser.parse_args(argv[:1])
    try:
        return globals()[f"_{args.command}"](argv[1:]) or 0
    except (Siglip2Error, NotImplementedError) as error:
        print(f"siglip2 {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> None:
    from .cli_config import parse_config

    dry_ranks, argv = _dry_run_options(argv)
    config = parse_config(argv, prog="siglip2 train")
    if dry_ranks is not None:
        from .train.dry_run import dry_run
        from .train.dry_run_table import format_dry_run

        print(format_dry_run(dry_run(config, world_size=dry_ranks)))
        return
    from .train.trainer import train

    _quiet()
    train(config)


def _dry_run_options(argv: list[str]) -> tuple[int | None, list[str]]:
    """Devices to count for, if that is asked, and the other options: those of the config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", nargs="?", const="")
    args, others = parser.parse_known_args(argv)
    if args.world_size is None:
        return (1 if args.dry_run else None), others
    if not args.dry_run:
        raise ConfigError(
            "--world-size: need --dry-run with it; got it alone. A run has as many processes as"
            " torchrun starts: torchrun --nproc-per-node N -m siglip2 train"
        )
    from .train.dry_run import parse_world_size

    return parse_world_size(args.world_size), others


def _bench(argv: list[str]) -> int:
    from siglip2_bench.cli import main as bench_main

    return bench_main(argv)


def _eval(argv: list[str]) -> None:
    from .config import Config, DataConfig, EvalConfig
    from .train.finish import evaluate_model

    parser = _parser("eval")
    parser.add_argument("model", help="folder or file that siglip2.from_pretrained takes")
    parser.add_argument("data", help="source, as for --data.train")
    parser.add_argument("--tokenizer", help="default: the model folder's own")
    parser.add_argument("--language", help="retrieval in this language only")
    parser.add_argument("--classes", help='JSON file {"classes": [...], "templates": [...]}')
    parser.add_argument("--activation", choices=("softmax", "sigmoid"), default="softmax")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--out", help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    config = Config(
        data=replace(DataConfig(), val=args.data, tokenizer=args.tokenizer),
        eval=EvalConfig(
            batch_size=args.batch_size,
            max_images=args.max_images,
            classes=args.classes,
            activation=args.activation,
        ),
    )
    _quiet()
    evaluate_model(args.model, config, language=args.language, out=args.out)


def _report(argv: list[str]) -> None:
    from .eval.report import write_report

    parser = _parser("report")
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--compare", help="another run's folder, evaluated on the same sets")
    args = parser.parse_args(argv)
    print(f"report in {write_report(args.run, compare=args.compare)}")


def _export(argv: list[str]) -> None:
    from .models.factory import from_pretrained, save_pretrained

    parser = _parser("export")
    parser.add_argument(
        "model", help="folder or file that siglip2.from_pretrained takes, or a run's folder"
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--format", choices=("hf", "open_clip", "timm", "big_vision"), default="hf")
    args = parser.parse_args(argv)
    source = Path(args.model)
    source = source / "export" if (source / "export" / "config.json").is_file() else source
    tokenizer = None
    if (source / "tokenizer.json").is_file():
        from .data.tokenizer import get_tokenizer

        tokenizer = get_tokenizer(str(source))
    model = from_pretrained(str(source))
    save_pretrained(model, args.out, format=args.format, tokenizer=tokenizer)
    print(f"wrote {args.out} ({args.format})")


def _caption(argv: list[str]) -> None:
    from .locca.commands import caption

    caption(_parser("caption"), argv)


def _locate(argv: list[str]) -> None:
    from .locca.commands import locate

    locate(_parser("locate"), argv)


def _data(argv: list[str]) -> None:
    from .config import DataConfig, QuickstartConfig
    from .data import boxes_command

    parser = _parser("data")
    commands = parser.add_subparsers(dest="what", required=True)
    inspect = commands.add_parser("inspect", help="what a source holds, and what is wrong with it")
    inspect.add_argument("source", help="as for --data.train")
    build = commands.add_parser("quickstart", help="build the default data set")
    build.add_argument("--concepts", type=int, help="training concepts; default all")
    boxes = commands.add_parser("boxes", help="find what captions name, with a detector of yours")
    boxes_command.add_options(boxes)
    args = parser.parse_args(argv)
    if args.what == "boxes":
        print(boxes_command.boxes(args))
    elif args.what == "inspect":
        from .data.inspect import inspect as inspect_source

        print(inspect_source(args.source, DataConfig()))
    else:
        from .data.quickstart import quickstart_dir

        print(quickstart_dir(QuickstartConfig(concepts=args.concepts)))


def _config(argv: list[str]) -> None:
    from .recipe.presets import PRESETS, preset
    from .train.run_dir import to_yaml

    parser = _parser("config")
    parser.add_argument("what", choices=("list", "show"))
    parser.add_argument("name", nargs="?", default="quickstart", help="a preset")
    args = parser.parse_args(argv)
    if args.what == "show":
        print(to_yaml(preset(args.name)), end="")
    else:
        for name, make in PRESETS.items():
            print(f"{name:12} {make.__doc__.splitlines()[0]}")


def _doctor(argv: list[str]) -> int:
    from .doctor import diagnose

    parser = _parser("doctor")
    parser.add_argument(
        "model", help="model folder, tokenizer.json, SentencePiece .model or hub id"
    )
    parser.add_argument("--text-length", type=int, help="default: the model's, or 64")
    args = parser.parse_args(argv)
    return diagnose(args.model, text_length=args.text_length)


def _env(argv: list[str]) -> None:
    from siglip2_kernels.report import report

    from .data.packing import packing_backend
    from .train.run_dir import environment

    _parser("env").parse_args(argv)
    print(json.dumps(environment(), indent=1))
    for choice in report():
        print(choice)
    print(f"images to patches: {packing_backend()}")


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"siglip2 {command}", description=COMMANDS[command])


def _quiet() -> None:
    """Our own log lines on the console; nothing else adds noise to a run."""
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("siglip2").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
