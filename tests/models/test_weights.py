"""Weights out and in again: bit for bit, in every format."""

import json
import logging
import os

import pytest
import torch
from models.tiny import double, random_model, tiny_architecture
from safetensors.torch import load_file, save_file

from siglip2.models.factory import create_model, from_pretrained, load_vision, save_pretrained
from siglip2.models.presets import ARCHITECTURES
from siglip2.models.siglip2 import Siglip2
from siglip2.models.weights import big_vision, hf, open_clip
from siglip2.models.weights.files import write_tensors
from siglip2.models.weights.rules import export_state

ARCHITECTURES_HERE = {
    "fixed": tiny_architecture(text_width=24),
    "naflex": tiny_architecture(is_naflex=True, head_width=12),
    "head-72": tiny_architecture(head_width=72, num_heads=1, patch_size=2),
}
KINDS = pytest.mark.parametrize("kind", ARCHITECTURES_HERE)


def assert_same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, x in a.state_dict().items():
        assert torch.equal(x, b.state_dict()[name]), name


@KINDS
@pytest.mark.parametrize("format", ["hf", "open_clip", "big_vision"])
def test_round_trip(format, kind, tmp_path):
    model = random_model(ARCHITECTURES_HERE[kind])
    save_pretrained(model, tmp_path, format=format)
    loaded = from_pretrained(tmp_path)
    assert loaded.architecture == model.architecture
    assert_same_weights(loaded, model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


@KINDS
def test_round_trip_of_a_timm_tower(kind, tmp_path):
    source, target = (random_model(ARCHITECTURES_HERE[kind], seed=i) for i in (0, 1))
    text = {name: x.clone() for name, x in target.text.state_dict().items()}
    save_pretrained(source, tmp_path, format="timm")
    load_vision(target, tmp_path)
    assert_same_weights(target.vision, source.vision)
    assert all(torch.equal(x, text[name]) for name, x in target.text.state_dict().items())


@pytest.mark.parametrize("format", ["hf", "open_clip", "big_vision"])
def test_vision_tower_alone_from_a_whole_model(format, tmp_path):
    source, target = (random_model(tiny_architecture(), seed=i) for i in (0, 1))
    save_pretrained(source, tmp_path, format=format)
    parameters = list(target.vision.parameters())
    load_vision(target, tmp_path)
    assert_same_weights(target.vision, source.vision)
    assert not torch.equal(target.text.token_embed, source.text.token_embed)
    # in place: an optimiser that holds the parameters goes on
    assert all(a is b for a, b in zip(parameters, target.vision.parameters(), strict=True))


@pytest.mark.parametrize("pool", ["last", "map"])
@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per-layer"])
def test_big_vision_layouts(stacked, prefix, pool, tmp_path):
    model = random_model(tiny_architecture(text_width=24, pool=pool))
    tensors = export_state(
        big_vision.rules(model.architecture, stacked=stacked), model.state_dict()
    )
    tensors = {prefix + name: x for name, x in tensors.items()}
    if prefix:
        tensors["opt/0/count"] = torch.zeros(())  # optimiser state is left alone
    write_tensors(tmp_path / "siglip2.npz", tensors)
    for source in (tmp_path, tmp_path / "siglip2.npz"):
        loaded = from_pretrained(source)
        assert loaded.architecture == model.architecture
        assert_same_weights(loaded, model)


def test_big_vision_names_and_shapes_are_the_released_ones():
    """B/16 at 256 pixels, as listed by big_vision."""
    with torch.device("meta"):
        model = Siglip2(ARCHITECTURES["siglip2-base-patch16-256"])
    shapes = {
        name: tuple(x.shape)
        for name, x in export_state(
            big_vision.rules(model.architecture), model.state_dict()
        ).items()
    }
    block = "Transformer/encoderblock"
    attention = "MultiHeadDotProductAttention_0"
    expected = {
        "t": (1,),
        "b": (1,),
        "img/embedding/kernel": (16, 16, 3, 768),
        "img/pos_embedding": (1, 256, 768),
        f"img/{block}/LayerNorm_1/scale": (12, 768),
        f"img/{block}/{attention}/query/kernel": (12, 768, 12, 64),
        f"img/{block}/{attention}/value/bias": (12, 12, 64),
        f"img/{block}/{attention}/out/kernel": (12, 12, 64, 768),
        f"img/{block}/MlpBlock_0/Dense_0/kernel": (12, 768, 3072),
        "img/Transformer/encoder_norm/bias": (768,),
        "img/MAPHead_0/probe": (1, 1, 768),
        f"img/MAPHead_0/{attention}/key/kernel": (768, 12, 64),
        "txt/Embed_0/embedding": (256_000, 768),
        "txt/pos_embedding": (1, 64, 768),
        "txt/Encoder_0/encoderblock/MlpBlock_0/Dense_1/bias": (12, 768),
        "txt/head/kernel": (768, 768),
    }
    assert shapes.items() >= expected.items()
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 375_234_050


def test_big_vision_kernels_compute_what_our_layers_do():
    """flax's contractions, written out: heads and patch axes are where its layers expect them."""
    model = double(random_model(tiny_architecture()))
    vision, block = model.vision, model.vision.encoder.blocks[0]
    tensors = export_state(big_vision.rules(model.architecture), model.state_dict())
    path = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    x = torch.randn(5, 16, dtype=torch.float64)
    heads = block.attn.qkv(x).view(5, 3, 2, 8).unbind(1)
    pairs = {}
    for name, ours in zip(("query", "key", "value"), heads, strict=True):
        kernel, bias = (tensors[f"{path}/{name}/{part}"][0] for part in ("kernel", "bias"))
        pairs[name] = ours, torch.einsum("td,dhe->the", x, kernel) + bias
    out = torch.einsum("the,hed->td", heads[0], tensors[f"{path}/out/kernel"][0])
    pairs["out"] = block.attn.out(heads[0].flatten(1)), out + tensors[f"{path}/out/bias"][0]
    patches = torch.randn(5, 4, 4, 3, dtype=torch.float64)
    embedded = torch.einsum("tyxc,yxcd->td", patches, tensors["img/embedding/kernel"])
    embedded += tensors["img/embedding/bias"]
    pairs["patches"] = vision.patch_embed(patches.flatten(1)), embedded
    key = torch.einsum(
        "td,dhe->the",
        x,
        tensors["img/MAPHead_0/MultiHeadDotProductAttention_0/key/kernel"],
    )
    key += tensors["img/MAPHead_0/MultiHeadDotProductAttention_0/key/bias"]
    pairs["pool key"] = vision.pool.kv(x)[:, :16].view(5, 2, 8), key
    for name, (ours, theirs) in pairs.items():
        assert torch.allclose(ours, theirs, rtol=0, atol=2**10 * torch.finfo(x.dtype).eps), name


def test_sharded_files_and_old_buffers(tmp_path):
    model = random_model(tiny_architecture())
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    tensors["text_model.embeddings.position_ids"] = torch.arange(6)[None]
    names = list(tensors)
    shards = {"model-00001.safetensors": names[:9], "model-00002.safetensors": names[9:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / hf.WEIGHTS).unlink()
    assert_same_weights(from_pretrained(tmp_path), model)


def test_half_precision_files_become_float32(tmp_path):
    model = random_model(tiny_architecture())
    expected = {name: x.bfloat16().float() for name, x in model.state_dict().items()}
    save_pretrained(model.bfloat16(), tmp_path)
    assert load_file(tmp_path / hf.WEIGHTS)["logit_bias"].dtype == torch.bfloat16
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())


def test_numpy_bfloat16_is_read(tmp_path):
    import numpy as np

    model = random_model(tiny_architecture())
    tensors = export_state(big_vision.rules(model.architecture), model.state_dict())
    arrays = {
        name: x.bfloat16().contiguous().view(torch.int16).numpy().view("V2")
        for name, x in tensors.items()
    }
    np.savez(tmp_path / "bf16.npz", **arrays)
    loaded = from_pretrained(tmp_path / "bf16.npz").state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(loaded[name], x.bfloat16().float()), name


def test_file_without_config_takes_heads_from_the_released_models(tmp_path):
    model = create_model("siglip2-tiny-patch8-naflex", vocab_size=9)
    for format, weights in (("hf", hf.WEIGHTS), ("open_clip", open_clip.WEIGHTS)):
        save_pretrained(model, tmp_path / "saved", format=format)
        os.replace(tmp_path / "saved" / weights, tmp_path / f"{format}.safetensors")
        loaded = from_pretrained(tmp_path / f"{format}.safetensors")
        assert loaded.architecture == model.architecture
        assert_same_weights(loaded, model)


def test_create_model_takes_text_sizes_from_the_weights(tmp_path):
    name = "siglip2-tiny-patch8-32"
    model = create_model(name, vocab_size=19, text_length=7, text_pool="map")
    save_pretrained(model, tmp_path, format="big_vision")
    loaded = create_model(name, pretrained=tmp_path, dtype=torch.bfloat16)
    assert loaded.architecture == model.architecture
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, model)


def test_create_model_from_a_timm_tower_starts_the_text_tower_at_random(tmp_path, caplog):
    name = "siglip2-tiny-patch8-32"
    source = create_model(name)
    save_pretrained(source, tmp_path, format="timm")
    with caplog.at_level(logging.INFO, logger="siglip2"):
        model = create_model(name, pretrained=tmp_path, init_bias=-3.0)
    (line,) = [r.getMessage() for r in caplog.records if "vision tower" in r.getMessage()]
    assert "text tower at random" in line
    assert_same_weights(model.vision, source.vision)
    assert model.bias.item() == -3
    assert model.text.token_embed.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_saving_replaces_files_whole_and_leaves_others(tmp_path, monkeypatch):
    first, second = (random_model(tiny_architecture(), seed=i) for i in (0, 1))
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(first, tmp_path)

    def fails(path, content):
        raise OSError("disk full")

    monkeypatch.setattr("siglip2.models.factory.write_json", fails)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(second, tmp_path)
    assert_same_weights(from_pretrained(tmp_path), first)
    monkeypatch.undo()
    save_pretrained(second, tmp_path)
    assert_same_weights(from_pretrained(tmp_path), second)
    names = {"config.json", hf.WEIGHTS, "notes.txt", "preprocessor_config.json"}
    assert {entry.name for entry in tmp_path.iterdir()} == names


def test_shared_storage_is_written_whole(tmp_path):
    """Parameters that are views of one buffer, as optimisers and FSDP make them."""
    model = random_model(tiny_architecture())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    save_pretrained(model, tmp_path)
    assert_same_weights(from_pretrained(tmp_path), model)
