"""Find the weights behind a path or hub id, tell their format, and fit them to a model."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from ...errors import CheckpointError, require
from ..presets import ARCHITECTURES, Architecture, VisionConfig
from . import big_vision, hf, match, open_clip, timm
from .files import SUFFIXES, read_json, read_tensors
from .rules import Rule, State, export_state, import_state

Format = Literal["hf", "open_clip", "timm", "big_vision"]
FORMATS: dict[str, ModuleType] = {
    "hf": hf,
    "open_clip": open_clip,
    "timm": timm,
    "big_vision": big_vision,
}
HUB_FILES = ["*.json", "*.safetensors", "*.npz"]  # torch's .bin only where there is nothing else
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Checkpoint(NamedTuple):
    """Tensors under the format's own names, and its config where it has one."""

    name: str  # as the user gave it
    format: Format
    tensors: State
    config: Mapping[str, Any] | None


def read(source: str | Path, *, format: str = "auto") -> Checkpoint:
    """Read a folder, a weight file, or (where no such path exists) a repository of the hub."""
    if format not in ("auto", *FORMATS):
        raise ValueError(f"need format 'auto' or one of {', '.join(FORMATS)}; got {format!r}")
    path = Path(source)
    if not path.exists():
        path = _from_hub(str(source))
    folder = path if path.is_dir() else path.parent
    configs = _configs(folder)
    if path.is_dir():
        format = _folder_format(path, configs) if format == "auto" else format
        path = _weight_file(path, format)
    tensors = read_tensors(path)
    if format == "auto":
        format = _tensor_format(tensors, path)
    elif not FORMATS[format].recognises(tensors):
        raise CheckpointError(f"{path} does not hold weights in format {format!r}")
    if format in ("hf", "big_vision"):
        tensors = FORMATS[format].clean(tensors)
    return Checkpoint(str(source), format, tensors, configs.get(format))


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Configs in `folder`, by the format they belong to."""
    found: dict[str, dict[str, Any]] = {}
    if (folder / open_clip.CONFIG).is_file():
        found["open_clip"] = read_json(folder / open_clip.CONFIG)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if "architecture" in config:
            found["timm"] = config
        elif str(config.get("model_type", "")).startswith("siglip"):
            found["hf"] = config
    return found


def _folder_format(folder: Path, configs: Mapping[str, Any]) -> str:
    if len(configs) > 1:
        raise CheckpointError(
            f"{folder} holds configs of {' and '.join(configs)}; say which with format=..."
        )
    if configs:
        return next(iter(configs))
    if list(folder.glob("*.npz")):
        return "big_vision"
    raise CheckpointError(
        f"need a folder with config.json of a siglip or siglip2 model, {open_clip.CONFIG},"
        f" timm's config.json or one .npz; {folder} holds {_contents(folder)}"
    )


def _weight_file(folder: Path, format: str) -> Path:
    if format == "big_vision":
        files = sorted(folder.glob("*.npz"))
        if len(files) != 1:
            raise CheckpointError(f"need one .npz in {folder}; it holds {_contents(folder)}")
        return files[0]
    names = FORMATS[format].FILES
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"need {' or '.join(names)} in {folder}; it holds {_contents(folder)}")


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"


def _tensor_format(tensors: State, path: Path) -> Format:
    for name, module in FORMATS.items():
        if module.recognises(tensors):
            return name  # type: ignore[return-value]
    raise CheckpointError(
        f"{path} holds no SigLIP weights in a known format ({', '.join(FORMATS)});"
        f" its first tensors are {', '.join(list(tensors)[:5]) or 'none'}"
    )


def _from_hub(name: str) -> Path:
    short = name.removeprefix("hf-hub:")
    if short in ARCHITECTURES:
        raise CheckpointError(
            f"no such file or folder: {name!r}. The released weights' hub id is 'google/{short}'"
        )
    if not _HUB_ID.fullmatch(short) or short.endswith(SUFFIXES):
        raise CheckpointError(f"no such file or folder: {name!r}")
    hub: Any = require("huggingface_hub", "hub")
    try:
        folder = Path(hub.snapshot_download(short, allow_patterns=HUB_FILES))
        if not any(entry.suffix in SUFFIXES for entry in folder.iterdir()):
            folder = Path(hub.snapshot_download(short, allow_patterns=[*HUB_FILES, "*.bin"]))
    except Exception as error:  # the hub's client raises dozens of network and naming errors
        raise CheckpointError(
            f"{name!r} is no file or folder here, and the hub could not serve it as a repository:"
            f" no connection, no such repository, or no access ({type(error).__name__}). Check the"
            " path, or download it first and pass its folder"
        ) from error
    return folder


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Both towers' shapes. Raises CheckpointError for timm's files, which hold one."""
    if checkpoint.format == "timm":
        model = timm.released_with(checkpoint.tensors) or "NAME"
        raise CheckpointError(
            f"{checkpoint.name!r} is a timm vision tower: it has no text tower, temperature or"
            f" bias. Use create_model({model!r}, pretrained=...), which starts those from random"
            " weights, or load_vision(model, ...)"
        )
    module = FORMATS[checkpoint.format]
    return module.architecture(checkpoint.tensors, checkpoint.config, what=repr(checkpoint.name))


def vision_config_of(checkpoint: Checkpoint, like: VisionConfig) -> VisionConfig:
    """The vision tower's shape; heads as in `like` where the file does not say."""
    what = repr(checkpoint.name)
    if checkpoint.format == "timm":
        heads = timm.num_heads_in(checkpoint.config) or like.size.num_heads
        return timm.vision(checkpoint.tensors, heads, what=what)
    return architecture_of(checkpoint).vision


def check_same_kind(name: str, found: VisionConfig, wanted: VisionConfig) -> None:
    """Raise CheckpointError when only one of them is NaFlex, or when their heads differ."""
    if found.is_naflex != wanted.is_naflex:
        kinds = {False: "fixed resolution", True: "variable resolution"}
        suggestion = _released_like(found)
        raise CheckpointError(
            f"{name!r} has model_type {hf.model_type(found)!r} ({kinds[found.is_naflex]}), but a"
            f" {kinds[wanted.is_naflex]} model was asked for. Use create_model({suggestion!r});"
            " names ending in '-naflex' are the variable-resolution ones"
        )
    if found.size.num_heads != wanted.size.num_heads:
        raise CheckpointError(
            f"{name!r} has {found.size.num_heads} vision heads; the model has"
            f" {wanted.size.num_heads}. Ask for the model these weights are of"
        )


def _released_like(vision: VisionConfig) -> str:
    names = (name for name, known in ARCHITECTURES.items() if known.vision == vision)
    return next(names, "NAME")


def full_rules(checkpoint: Checkpoint, architecture: Architecture) -> list[Rule]:
    module = FORMATS[checkpoint.format]
    if checkpoint.format == "big_vision":
        return module.rules(architecture, stacked=big_vision.is_stacked(checkpoint.tensors))
    return module.rules(architecture)


def vision_rules(checkpoint: Checkpoint, vision: VisionConfig) -> list[Rule]:
    module = FORMATS[checkpoint.format]
    if checkpoint.format == "big_vision":
        return module.vision_rules(vision, stacked=big_vision.is_stacked(checkpoint.tensors))
    return module.vision_rules(vision)


def fit(checkpoint: Checkpoint, rules: list[Rule], meta: State) -> State:  # float32, our names
    """The checkpoint's tensors as the model's; `meta` is the model's state on the meta device.

    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    expected = export_state(rules, meta)
    match.check(checkpoint.tensors, expected, what=repr(checkpoint.name))
    return import_state(rules, checkpoint.tensors)


def vision_part(checkpoint: Checkpoint) -> Checkpoint:
    """Without the text tower and the scalars."""
    prefix = FORMATS[checkpoint.format].VISION_PREFIX
    tensors = {name: x for name, x in checkpoint.tensors.items() if name.startswith(prefix)}
    return checkpoint._replace(tensors=tensors)


def on_meta(state: State) -> State:
    return {name: torch.empty_like(x, device="meta") for name, x in state.items()}
