"""Reading and writing weight files. Nothing is unpickled; every fault is one CheckpointError."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from .rules import State

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)


def read_tensors(path: Path) -> State:
    """Tensors, on the CPU, of .safetensors (also its index of shards), .npz or a torch file."""
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"need a file ending in {', '.join(SUFFIXES)}; got {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, "safetensors", error) from None


def _read_sharded(index: Path) -> State:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no 'weight_map': it is not an index of shards")
    tensors: State = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is not beside it")
        tensors.update(read_tensors(shard))
    return tensors


def _read_npz(path: Path) -> State:
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise CheckpointError(f"{path} holds a single array, not a big_vision .npz")
        with arrays:
            return {name: _from_numpy(arrays[name]) for name in arrays.files}
    except CheckpointError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if _is_pickled(path):
            raise CheckpointError(
                f"{path} holds pickled objects, which are never loaded; need plain arrays"
            ) from None
        raise _unreadable(path, ".npz", error) from None


def _is_pickled(path: Path) -> bool:
    # What numpy refuses inside a sound archive is an object array; outside of one, a bare pickle.
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy stores bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _read_torch(path: Path) -> State:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip reader, an unpickler and the OS each have their own
        raise _unreadable(path, "torch", error) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors")
    return {name.removeprefix("module."): x for name, x in loaded.items()}


def _unreadable(path: Path, kind: str, error: Exception) -> CheckpointError:
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return CheckpointError(
            f"{path} is a web page, not weights: the download failed. Fetch it again"
        )
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{path} is a Git LFS pointer, not weights. Run 'git lfs pull'")
    reason = next(iter(str(error).strip().splitlines()), "no reason given")
    return CheckpointError(
        f"cannot read {path} ({path.stat().st_size} bytes) as a {kind} file: it is cut short,"
        f" damaged or of another kind ({type(error).__name__}: {reason})"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"cannot read {path} as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"need a JSON object in {path}; got {type(loaded).__name__}")
    return loaded


def write_tensors(path: Path, tensors: State) -> None:
    """Write .safetensors, or .npz (float32, as big_vision's)."""
    if path.suffix == ".npz":
        # An open file: given a name, numpy would append .npz to a temporary one.
        with path.open("wb") as file:
            np.savez(file, **{name: x.float().cpu().numpy() for name, x in tensors.items()})
        return
    # clone: tensors cut from one storage would be refused as shared
    owned = {
        name: x.cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
    }
    save_file(owned, path, metadata={"format": "pt"})  # transformers asks for this note


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files replace those of `folder` when the block ends without an error.

    It lies beside them, so that each move is one rename and a reader never sees half a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"need a folder to save into; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        # Weights before the config that describes them: an interrupted save is not taken for a
        # whole one.
        for file in sorted(scratch.iterdir(), key=lambda file: file.suffix == ".json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
