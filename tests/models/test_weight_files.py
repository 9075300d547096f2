"""Damaged files, files of another kind and paths that lead nowhere: one CheckpointError each."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from models.tiny import random_model, tiny_architecture
from safetensors.torch import load_file

from siglip2.errors import CheckpointError
from siglip2.models.factory import from_pretrained, save_pretrained
from siglip2.models.weights import hf, open_clip


@pytest.fixture
def saved(tmp_path):
    save_pretrained(random_model(tiny_architecture()), tmp_path / "saved")
    return tmp_path / "saved"


def test_truncated_safetensors(saved):
    path = saved / hf.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"cannot read .*model.safetensors \(\d+ bytes\).*cut"
    ):
        from_pretrained(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"", r"cannot read .* \(0 bytes\)"),
    ],
    ids=["html", "lfs", "empty"],
)
def test_files_that_are_no_weights(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / name)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_are_never_loaded(tmp_path):
    np.savez(tmp_path / "objects.npz", t=np.array([Trap()], dtype=object))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("objects.npz", "bare.npz"):
        with pytest.raises(CheckpointError, match=r"holds pickled objects, which are never loaded"):
            from_pretrained(tmp_path / name)
    torch.save({"logit_scale": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*trap.pt"):
        from_pretrained(tmp_path / "trap.pt")


def test_truncated_npz_and_single_array(tmp_path):
    save_pretrained(random_model(tiny_architecture()), tmp_path, format="big_vision")
    path = tmp_path / "model.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model.npz .* as a .npz file"):
        from_pretrained(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(CheckpointError, match=r"holds a single array"):
        from_pretrained(path)


def test_torch_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"is not a dictionary of tensors"):
        from_pretrained(tmp_path / "list.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"no SigLIP weights in a known format .* weight"):
        from_pretrained(tmp_path / "other.pt")


def test_folders_that_hold_no_model(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"need a folder with config.json.*holds nothing"):
        from_pretrained(tmp_path / "empty")
    (saved / hf.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"need model.safetensors or .* in .*config.json"):
        from_pretrained(saved)
    (saved / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json as JSON"):
        from_pretrained(saved)


def test_missing_shard(saved):
    (saved / hf.WEIGHTS).unlink()
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_bias": "model-00001.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"names the shard model-00001\.safetensors, which is not"
    ):
        from_pretrained(saved)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no 'weight_map'"):
        from_pretrained(saved)


def test_two_formats_in_one_folder_need_a_choice(saved):
    save_pretrained(random_model(tiny_architecture()), saved, format="open_clip")
    with pytest.raises(
        CheckpointError, match=r"configs of open_clip and hf; say which with format="
    ):
        from_pretrained(saved)
    assert (saved / open_clip.WEIGHTS).is_file()
    assert from_pretrained(saved, format="hf").architecture == tiny_architecture()


def test_paths_that_do_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file or folder: '.*nowhere'"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no such file or folder: 'a/b.safetensors'"):
        from_pretrained("a/b.safetensors")
    with pytest.raises(CheckpointError, match=r"hub id is 'google/siglip2-base-patch16-256'"):
        from_pretrained("siglip2-base-patch16-256")


def test_hub_out_of_reach(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"is no file or folder here, and the hub could not"):
        from_pretrained("google/siglip2-base-patch16-256")


@pytest.mark.parametrize("weights", [hf.WEIGHTS, "pytorch_model.bin"])
def test_hub_repository_is_read_like_a_folder(saved, weights, monkeypatch):
    """Pickled weights are fetched only where a repository has no others."""
    hub = pytest.importorskip("huggingface_hub")
    if weights != hf.WEIGHTS:
        torch.save(load_file(saved / hf.WEIGHTS), saved / weights)
        (saved / hf.WEIGHTS).unlink()
    asked = []

    def snapshot_download(name, *, allow_patterns):
        folder = saved.parent / f"snapshot-{len(asked)}"
        folder.mkdir()
        for file in saved.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, folder)
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert from_pretrained("hf-hub:someone/model").architecture == tiny_architecture()
    assert asked == ["someone/model"] * (1 if weights == hf.WEIGHTS else 2)


def test_saving_into_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"need a folder to save into"):
        save_pretrained(random_model(tiny_architecture()), tmp_path / "file")


def test_several_npz_files_and_other_suffixes(tmp_path):
    save_pretrained(random_model(tiny_architecture()), tmp_path, format="big_vision")
    (tmp_path / "second.npz").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"need one \.npz in .*; it holds model.npz, second.npz"
    ):
        from_pretrained(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"need a file ending in .safetensors, .npz, .bin, .pt"
    ):
        from_pretrained(tmp_path / "weights.h5")


def test_config_that_is_no_object(saved):
    (saved / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"need a JSON object in .*config.json; got list"):
        from_pretrained(saved)
