"""The decoder on disk, beside the files of the model it belongs to."""

from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..models.decoder import Decoder, DecoderConfig
from ..models.presets import TowerSize
from ..models.weights.files import (
    read_json,
    read_tensors,
    replacing_files,
    write_json,
    write_tensors,
)

WEIGHTS, CONFIG = "decoder.safetensors", "decoder.json"


def save_decoder(decoder: Decoder, folder: str | Path) -> None:
    """Write decoder.safetensors and decoder.json into `folder`; other files there stay."""
    with replacing_files(Path(folder)) as scratch:
        write_tensors(scratch / WEIGHTS, decoder.state_dict())
        write_json(scratch / CONFIG, asdict(decoder.config))


def load_decoder(folder: str | Path, *, device: torch.device | str | None = None) -> Decoder:
    """What `save_decoder` wrote.

    Raises CheckpointError when the folder has no decoder, or a damaged or foreign one.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"need a model with a captioning decoder; {folder} has no {' and no '.join(missing)}."
            " Released checkpoints come without one: train with LocCa, and"
            " siglip2.locca.save_decoder writes it"
        )
    config = _config(folder / CONFIG)
    with torch.device("meta"):
        decoder = Decoder(config)
    state, wanted = read_tensors(folder / WEIGHTS), decoder.state_dict()
    shapes = [{name: tuple(x.shape) for name, x in s.items()} for s in (state, wanted)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {', '.join(wrong[:3])}"
            " missing, unknown or of another shape. Save both again with save_decoder"
        )
    state = {name: x.to(device or "cpu", torch.float32) for name, x in state.items()}
    decoder.load_state_dict(state, assign=True)
    return decoder


def _config(path: Path) -> DecoderConfig:
    fields = read_json(path)
    try:
        return DecoderConfig(**{**fields, "size": TowerSize(**fields["size"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a decoder: {error}") from None
