"""Models by name, from weights, and back to disk."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import Pool
from ..errors import CheckpointError
from .presets import Architecture, architecture
from .siglip2 import Siglip2
from .weights import hf_files, open_clip, timm
from .weights.checkpoint import (
    FORMATS,
    Checkpoint,
    Format,
    architecture_of,
    check_same_kind,
    fit,
    full_rules,
    on_meta,
    read,
    vision_config_of,
    vision_part,
    vision_rules,
)
from .weights.files import replacing_files, write_json, write_tensors
from .weights.hf_files import SavableTokenizer
from .weights.rules import export_state

log = logging.getLogger("siglip2")


def create_model(
    name: str,
    *,
    pretrained: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    vocab_size: int | None = None,
    text_length: int | None = None,
    text_pool: Pool | None = None,
    init_temperature: float = 10.0,
    init_bias: float = -10.0,
) -> Siglip2:
    """A model by name, with big_vision's random weights or those of `pretrained`.

    Args:
        name: One of `list_models()`; a prefix such as `google/` is ignored.
        pretrained: Anything `from_pretrained` takes, of exactly this architecture. A timm file
            fills the vision tower alone; the rest starts from random weights.
        dtype: Of activations; weights are float32. None means float32.
        vocab_size, text_length, text_pool: None takes what `pretrained` has, or the released
            models' values.
        init_temperature: exp(log_scale) at the start; weights that bring their own replace it and
            `init_bias`.

    Raises ValueError for an unknown name, CheckpointError when `pretrained` does not fit.
    """
    asked = {"vocab_size": vocab_size, "text_length": text_length, "text_pool": text_pool}
    arch, dtype = architecture(name, **asked), dtype or torch.float32
    checkpoint = None if pretrained is None else read(pretrained)
    if checkpoint is not None and checkpoint.format != "timm":
        text = architecture_of(checkpoint).text
        own = {"vocab_size": text.vocab_size, "text_length": text.length, "text_pool": text.pool}
        merged = {key: own[key] if value is None else value for key, value in asked.items()}
        return _as_asked(checkpoint, architecture(name, **merged), dtype, device)
    # Parameters come uninitialised from the constructor: init_weights is the only initialisation.
    with torch.device(device or "cpu"):
        model = Siglip2(arch, init_temperature=init_temperature, init_bias=init_bias, dtype=dtype)
    if checkpoint is None:
        model.init_weights()
    else:
        model.text.init_weights()
        _fill_vision(model, checkpoint)
        log.info("%s: vision tower from %s; text tower at random", name, checkpoint.name)
    return model


def _as_asked(
    checkpoint: Checkpoint,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Siglip2:
    """`checkpoint` as `arch`. A tower of one resolution may go on as a NaFlex one (section 2.4.2):
    its patch embedding and position table are laid out alike.
    """
    fixed = replace(arch, vision=replace(arch.vision, is_naflex=False))
    if not arch.vision.is_naflex or architecture_of(checkpoint).vision != fixed.vision:
        return _loaded(checkpoint, arch, dtype, device)
    model = _loaded(checkpoint, fixed, dtype, device)
    model.architecture, model.vision.config = arch, arch.vision
    return model


def from_pretrained(
    path_or_id: str | Path,
    *,
    format: Format | str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Siglip2:
    """A model from a folder, a weight file or a hub id, its architecture read from config and
    tensor shapes.

    Reads transformers ("hf"), open_clip and big_vision; timm files hold no text tower (see
    `create_model`). Weights become float32; `dtype` is what activations are computed in.  Never
    unpickles.

    Raises CheckpointError when the files are missing, damaged, partial or of something else.
    """
    checkpoint = read(path_or_id, format=format)
    return _loaded(checkpoint, architecture_of(checkpoint), dtype or torch.float32, device)


def load_vision(model: Siglip2, path_or_id: str | Path, *, format: Format | str = "auto") -> None:
    """Fill the vision tower of `model` from a file of any format, a timm one included.

    Raises CheckpointError, with the model untouched, when the tower differs.
    """
    _fill_vision(model, read(path_or_id, format=format))


def save_pretrained(
    model: Siglip2,
    folder: str | Path,
    *,
    format: Format | str = "hf",
    tokenizer: SavableTokenizer | None = None,
) -> None:
    """Write `model` into `folder` so that the format's own library, and `from_pretrained`, load it.

    Writes model.safetensors and config.json with preprocessor_config.json ("hf"),
    open_clip_model.safetensors and open_clip_config.json ("open_clip"), the vision tower alone
    ("timm") or model.npz ("big_vision"); a tokenizer goes beside them.  Each file replaces an older
    one whole.

    Raises CheckpointError when the format has no place for the model: a text tower with
    text_pool="map" fits "big_vision" only.
    """
    if format not in FORMATS:
        raise ValueError(f"need format one of {', '.join(FORMATS)}; got {format!r}")
    arch, folder = model.architecture, Path(folder)
    module = FORMATS[format]
    rules = timm.vision_rules(arch.vision) if format == "timm" else module.rules(arch)
    tensors = export_state(rules, model.state_dict())
    with replacing_files(folder) as scratch:
        write_tensors(scratch / module.WEIGHTS, tensors)
        if tokenizer is not None and format != "timm":
            hf_files.save_tokenizer(tokenizer, scratch, arch.text.length)
        for name, content in _configs(arch, format).items():
            write_json(scratch / name, content)
    if format == "open_clip" and not timm.is_released(arch.vision):
        entry = open_clip.vision_entry(arch.vision)
        log.info("timm has no tower of this size: open_clip loads it once %r is registered", entry)


def _configs(arch: Architecture, format: str) -> dict[str, dict[str, Any]]:
    if format == "hf":
        return hf_files.config_files(arch)
    if format == "open_clip":
        return open_clip.config_files(arch)
    return timm.config_files(arch.vision) if format == "timm" else {}


def create_model_and_transforms(
    name: str,
    *,
    max_num_patches: int | None = None,
    **kwargs: Any,
) -> tuple[Siglip2, Callable[..., Any], Callable[..., Any]]:
    """`create_model` with the transforms for training and evaluation, in open_clip's order.

    Args:
        max_num_patches: NaFlex only; None takes the size of the position table (256 for released
            models).
        kwargs: As for `create_model`.
    """
    from ..data.images import FixedTransform, NaflexTransform

    model = create_model(name, **kwargs)
    vision = model.architecture.vision
    if vision.is_naflex:
        transform = NaflexTransform(vision.patch_size, max_num_patches or vision.grid_size**2)
    elif max_num_patches is not None:
        raise ValueError(
            f"{name!r} has a fixed resolution; max_num_patches is for '-naflex' models"
        )
    else:
        transform = FixedTransform(vision.image_size)
    # SigLIP 2 trains without image augmentation: both are the same.
    return model, transform, transform


def _loaded(
    checkpoint: Checkpoint,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Siglip2:
    with torch.device("meta"):
        model = Siglip2(arch, dtype=dtype)
    _check_heads(checkpoint, arch)
    state = fit(checkpoint, full_rules(checkpoint, arch), model.state_dict())
    model.load_state_dict(state, assign=True)
    return model.to(device or "cpu")


def _check_heads(checkpoint: Checkpoint, arch: Architecture) -> None:
    found = architecture_of(checkpoint)
    check_same_kind(checkpoint.name, found.vision, arch.vision)
    if found.text.size.num_heads != arch.text.size.num_heads:
        raise CheckpointError(
            f"{checkpoint.name!r} has {found.text.size.num_heads} text heads; the model has"
            f" {arch.text.size.num_heads}. Ask for the model these weights are of"
        )


def _fill_vision(model: Siglip2, checkpoint: Checkpoint) -> None:
    wanted = model.architecture.vision
    check_same_kind(checkpoint.name, vision_config_of(checkpoint, wanted), wanted)
    part = vision_part(checkpoint)
    meta = on_meta({f"vision.{name}": x for name, x in model.vision.state_dict().items()})
    state = fit(part, vision_rules(part, wanted), meta)
    model.vision.load_state_dict({name.removeprefix("vision."): x for name, x in state.items()})
