"""Each wrong, partial or damaged file is one CheckpointError that says what is needed."""

import json
import re

import pytest
import torch
from models.tiny import random_model, tiny_architecture
from safetensors.torch import load_file, save_file

from siglip2.errors import CheckpointError
from siglip2.models.factory import create_model, from_pretrained, load_vision, save_pretrained
from siglip2.models.weights import big_vision, hf
from siglip2.models.weights.files import write_tensors
from siglip2.models.weights.rules import export_state

FC1 = "vision_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture
def saved(tmp_path):
    save_pretrained(random_model(tiny_architecture()), tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder, change, name=hf.WEIGHTS):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def edit_config(folder, change, name="config.json"):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def test_misnamed_tensor_is_listed_with_the_nearest_name(saved):
    rewrite(saved, lambda t: t.update({FC1.replace("fc1", "fc_1"): t.pop(FC1)}))
    with pytest.raises(CheckpointError) as error:
        from_pretrained(saved)
    message = str(error.value)
    assert "does not fit the model" in message
    assert "missing (1):" in message
    assert f"{FC1} (nearest in the file: {FC1.replace('fc1', 'fc_1')})" in message
    assert "unexpected (1):" in message


def test_other_shapes_are_listed(saved):
    rewrite(saved, lambda t: t.update({FC1: t[FC1][:-1].clone()}))
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(FC1)}: need \(36, 16\), got \(35, 16\)"
    ):
        from_pretrained(saved)


def test_lost_layers_are_missing_keys_and_long_lists_are_cut(saved):
    def lose_last_layer(tensors):
        for name in [name for name in tensors if name.startswith("vision_model.encoder.layers.1.")]:
            del tensors[name]

    rewrite(saved, lose_last_layer)
    with pytest.raises(
        CheckpointError, match=r"missing \(16\):(\n    \S.*){10}\n    \.\.\. and 6 more"
    ):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "text_model.head.weight",
        "text_model.embeddings.token_embedding.weight",
    ],
)
def test_tensor_that_tells_the_architecture_is_missing(saved, name):
    rewrite(saved, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks {re.escape(name)}"):
        from_pretrained(saved)


def test_config_that_contradicts_the_weights(saved):
    edit_config(saved, lambda c: c["vision_config"].update(image_size=20))
    with pytest.raises(
        CheckpointError, match=r"image_size 20 .* another grid than the 16 positions"
    ):
        from_pretrained(saved)
    edit_config(saved, lambda c: c["vision_config"].update(image_size=16, num_attention_heads=3))
    with pytest.raises(CheckpointError, match=r"3 heads do not divide the width 16"):
        from_pretrained(saved)


@pytest.mark.parametrize("change", [{"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-5}])
def test_config_of_another_computation(saved, change):
    edit_config(saved, lambda c: c["text_config"].update(change))
    with pytest.raises(
        CheckpointError, match=r"need hidden_act 'gelu_pytorch_tanh' and layer_norm"
    ):
        from_pretrained(saved)


def test_naflex_weights_are_none_for_a_fixed_model(tmp_path):
    save_pretrained(create_model("siglip2-tiny-patch8-naflex", vocab_size=9), tmp_path)
    said = r"has model_type 'siglip2' \(variable resolution\), but a fixed"
    advice = r".*Use create_model\('siglip2-tiny-patch8-naflex'\); names ending in '-naflex' are"
    with pytest.raises(CheckpointError, match=said + advice):
        create_model("siglip2-tiny-patch8-32", pretrained=tmp_path)
    with pytest.raises(CheckpointError, match=said):
        load_vision(create_model("siglip2-tiny-patch8-32", vocab_size=9), tmp_path)


def test_a_tower_alone_is_loaded_as_what_it_is(tmp_path):
    save_pretrained(create_model("siglip2-tiny-patch8-32", vocab_size=9), tmp_path)
    said = r"has model_type 'siglip' \(fixed resolution\), but a variable"
    with pytest.raises(CheckpointError, match=said):
        load_vision(create_model("siglip2-tiny-patch8-naflex", vocab_size=9), tmp_path)


def test_a_fixed_model_goes_on_as_a_naflex_one(tmp_path):
    """SigLIP 2, section 2.4.2: the NaFlex stage begins with a fixed-resolution checkpoint."""
    fixed = create_model("siglip2-tiny-patch8-32", vocab_size=9)
    save_pretrained(fixed, tmp_path)
    model = create_model("siglip2-tiny-patch8-naflex", pretrained=tmp_path)
    assert model.architecture.vision.is_naflex
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model.encode_image(image), fixed.encode_image(image))
    save_pretrained(model, tmp_path / "naflex")
    assert from_pretrained(tmp_path / "naflex").architecture == model.architecture


def test_weights_of_another_model_are_listed_and_change_nothing(saved):
    with pytest.raises(
        CheckpointError, match=r"of another shape .*\(64, 3, 8, 8\), got \(16, 3, 4"
    ):
        raise_flat(lambda: create_model("siglip2-tiny-patch8-32", pretrained=saved))
    model = random_model(tiny_architecture(depth=3))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"missing \(16\)"):
        load_vision(model, saved)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def raise_flat(call):
    """The error on one line, so that one pattern spans its parts."""
    try:
        call()
    except CheckpointError as error:
        raise CheckpointError(" ".join(str(error).split())) from None


def test_other_number_of_heads(tmp_path):
    save_pretrained(random_model(tiny_architecture(num_heads=4, head_width=4)), tmp_path / "four")
    with pytest.raises(CheckpointError, match=r"has 4 vision heads; the model has 2"):
        load_vision(random_model(tiny_architecture(num_heads=2)), tmp_path / "four")


def test_unknown_heads_ask_for_the_config(saved):
    (saved / hf.WEIGHTS).rename(saved.parent / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"does not say how many attention heads"):
        from_pretrained(saved.parent / "alone.safetensors")


def test_timm_file_holds_no_whole_model(tmp_path):
    save_pretrained(create_model("siglip2-tiny-patch8-naflex"), tmp_path, format="timm")
    for format in ("auto", "timm"):
        with pytest.raises(
            CheckpointError, match=r"no text tower.*create_model\('siglip2-tiny-patch8-naflex', pre"
        ):
            from_pretrained(tmp_path, format=format)


def test_text_map_pool_has_no_place_in_most_formats(tmp_path):
    model = random_model(tiny_architecture(pool="map"))
    for format in ("hf", "open_clip"):
        with pytest.raises(
            CheckpointError, match=r"text_pool='map'; save with format='big_vision'"
        ):
            save_pretrained(model, tmp_path / "none", format=format)
    assert not (tmp_path / "none").exists()


def test_unknown_format_and_wrong_format(saved):
    for call in (from_pretrained, lambda *a, **k: save_pretrained(None, *a, **k)):
        with pytest.raises(ValueError, match=r"one of hf, open_clip, timm, big_vision; got 'onnx'"):
            call(saved, format="onnx")
    with pytest.raises(CheckpointError, match=r"does not hold weights in format 'timm'"):
        from_pretrained(saved, format="timm")


def test_other_number_of_text_heads(saved):
    edit_config(saved, lambda c: c["text_config"].update(num_attention_heads=4))
    name = "siglip2-tiny-patch8-32"
    with pytest.raises(CheckpointError, match=r"has 4 text heads; the model has 2"):
        create_model(name, pretrained=saved)


def test_grids_and_patches_that_are_no_squares(tmp_path):
    model = random_model(tiny_architecture(is_naflex=True))
    save_pretrained(model, tmp_path / "a")
    name = "vision_model.embeddings.position_embedding.weight"
    rewrite(tmp_path / "a", lambda t: t.update({name: torch.zeros(15, 16)}))
    with pytest.raises(CheckpointError, match=r"need a square grid of positions; got 15"):
        from_pretrained(tmp_path / "a")
    save_pretrained(model, tmp_path / "b")
    name = "vision_model.embeddings.patch_embedding.weight"
    rewrite(tmp_path / "b", lambda t: t.update({name: torch.zeros(16, 50)}))
    with pytest.raises(
        CheckpointError, match=r"need a patch embedding over P\*P\*3 values; got 50"
    ):
        from_pretrained(tmp_path / "b")


def test_big_vision_kernels_without_heads(tmp_path):
    model = random_model(tiny_architecture())
    tensors = export_state(big_vision.rules(model.architecture), model.state_dict())
    name = next(name for name in tensors if name.endswith("query/kernel") and "img" in name)
    tensors[name] = torch.zeros(16, 16)
    write_tensors(tmp_path / "flat.npz", tensors)
    with pytest.raises(
        CheckpointError, match=r"need query kernels \(..., D, H, E\); got \(16, 16\)"
    ):
        from_pretrained(tmp_path / "flat.npz")
