"""`Config` from the command line: a preset or YAML file, then dotted overrides (jsonargparse)."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import Config
from .errors import ConfigError, require
from .recipe.presets import PRESETS, preset
from .train.run_dir import flatten, to_yaml


def parse_config(argv: Sequence[str], *, prog: str) -> Config:
    """The `Config` that `argv` describes: `--config PRESET|FILE.yaml`, then `--group.field value`.

    Raises ConfigError for an unknown key (naming the nearest), a bad value or a missing file.
    """
    from jsonargparse import ArgumentError

    parser = _parser(prog)
    try:
        parsed = parser.parse_args([str(arg) for arg in argv])
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explain(str(error))) from None
    namespace = parser.instantiate(parsed)
    groups = {name: getattr(namespace, name) for name in Config.__dataclass_fields__}
    return Config(**groups)


def _parser(prog: str) -> Any:
    require("jsonargparse", "train")
    from jsonargparse import ActionConfigFile, ArgumentParser

    class PresetOrFile(ActionConfigFile):
        """jsonargparse takes YAML text where it takes a path: a preset's name becomes its YAML."""

        @staticmethod
        def apply_config(parser, cfg, dest, value) -> None:
            if value in PRESETS:
                value = to_yaml(preset(value))
            elif not Path(value).is_file():
                preset(value)  # raises, naming near matches
            ActionConfigFile.apply_config(parser, cfg, dest, value)

    parser = ArgumentParser(
        prog=prog,
        description="Any field of the configuration can be given as --group.field value.",
        exit_on_error=False,
    )
    names = ", ".join(PRESETS)
    parser.add_argument(
        "--config", action=PresetOrFile, help=f"a preset ({names}) or a YAML file; may be repeated"
    )
    for name, field in Config.__dataclass_fields__.items():
        parser.add_argument(f"--{name}", type=field.type, default=field.default_factory())
    return parser


def _explain(message: str) -> str:
    """jsonargparse's message, with the nearest key where one is unknown."""
    patterns = (
        r"[Uu]nrecognized arguments: --([\w.]+)",
        r"[Kk]ey ['\"]?([\w.]+)['\"]? is not expected",
        r"Group '([\w.]+)' does not accept (?:nested key|option) '([\w.]+)'",
    )
    for pattern in patterns:
        if found := re.search(pattern, message):
            key = ".".join(found.groups())
            near = _nearest(key)
            return f"unknown key {key!r}; " + (
                f"did you mean {near!r}?" if near else "see siglip2 train --help"
            )
    return " ".join(message.split())


def _nearest(key: str) -> str | None:
    """The known key most like `key`.

    Same last part, its initials (learning_rate: lr), or near in spelling.
    """
    known = list(flatten(asdict(Config())))
    group, _, leaf = key.rpartition(".")
    initials = "".join(part[0] for part in leaf.split("_") if part)
    for wanted in (leaf, initials):
        same = [name for name in known if name.rpartition(".")[2] == wanted]
        if same:
            return next((name for name in same if name.startswith(group)), same[0])
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return near[0] if near else None
