import pytest
import torch

from siglip2.models.factory import create_model, create_model_and_transforms
from siglip2.models.presets import ARCHITECTURES, list_models
from siglip2.models.siglip2 import Siglip2

# Counted on big_vision's own two-tower model: vision, its MAP head, text, total with t and b.
B_TEXT, L_TEXT, SO_TEXT, G_TEXT = 282_303_744, 565_570_560, 707_782_896, 708_225_648
B_MAP, L_MAP, SO_MAP, G_MAP = 7_087_104, 12_595_200, 15_238_352, 28_329_984
COUNTS = {
    "base-patch32-256": (94_552_320, B_MAP, B_TEXT, 376_856_066),
    "base-patch16-224": (92_884_224, B_MAP, B_TEXT, 375_187_970),
    "base-patch16-256": (92_930_304, B_MAP, B_TEXT, 375_234_050),
    "base-patch16-384": (93_176_064, B_MAP, B_TEXT, 375_479_810),
    "base-patch16-512": (93_520_128, B_MAP, B_TEXT, 375_823_874),
    "large-patch16-256": (315_956_224, L_MAP, L_TEXT, 881_526_786),
    "large-patch16-384": (316_283_904, L_MAP, L_TEXT, 881_854_466),
    "large-patch16-512": (316_742_656, L_MAP, L_TEXT, 882_313_218),
    "so400m-patch14-224": (427_680_704, SO_MAP, SO_TEXT, 1_135_463_602),
    "so400m-patch14-384": (428_225_600, SO_MAP, SO_TEXT, 1_136_008_498),
    "so400m-patch16-256": (427_888_064, SO_MAP, SO_TEXT, 1_135_670_962),
    "so400m-patch16-384": (428_256_704, SO_MAP, SO_TEXT, 1_136_039_602),
    "so400m-patch16-512": (428_772_800, SO_MAP, SO_TEXT, 1_136_555_698),
    "giant-opt-patch16-256": (1_163_168_256, G_MAP, G_TEXT, 1_871_393_906),
    "giant-opt-patch16-384": (1_163_659_776, G_MAP, G_TEXT, 1_871_885_426),
    "base-patch16-naflex": (92_930_304, B_MAP, B_TEXT, 375_234_050),
    "so400m-patch16-naflex": (427_888_064, SO_MAP, SO_TEXT, 1_135_670_962),
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_big_visions(name):
    with torch.device("meta"):
        model = Siglip2(ARCHITECTURES[f"siglip2-{name}"])
    counts = count(model.vision), count(model.vision.pool), count(model.text), count(model)
    assert counts == COUNTS[name]


def test_every_released_model_is_listed():
    released = {f"siglip2-{name}" for name in COUNTS}
    own = {name for name in list_models() if "tiny" in name or "quickstart" in name}
    assert set(list_models()) == released | own


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"unknown model 'siglip2-base-patch16-244'; did you mean"):
        create_model("siglip2-base-patch16-244")
    with pytest.raises(ValueError, match=r"see siglip2\.list_models\(\)"):
        create_model("resnet")


def test_hub_prefix_is_ignored_and_text_side_is_overridden():
    model = create_model(
        "google/siglip2-tiny-patch8-32", vocab_size=11, text_length=5, text_pool="map"
    )
    text = model.architecture.text
    assert (text.vocab_size, text.length, text.pool) == (11, 5, "map")
    assert model.encode_text(torch.tensor([[1, 2, 10, 0, 0]])).shape == (1, text.embed_dim)


def test_dtype_is_that_of_activations():
    model = create_model("siglip2-tiny-patch8-32", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).dtype == torch.bfloat16
    assert model.encode_image(torch.zeros(1, 3, 32, 32), normalize=True).dtype == torch.float32


def test_transforms_make_what_the_model_takes():
    from PIL import Image

    picture = Image.new("RGB", (60, 40), (200, 10, 90))
    model, train, val = create_model_and_transforms("siglip2-tiny-patch8-32")
    assert model.encode_image(torch.stack([train(picture), val(picture)])).shape == (2, 64)
    model, _, val = create_model_and_transforms("siglip2-tiny-patch8-naflex", max_num_patches=6)
    batch = val.collate([val(picture), val(picture.resize((20, 90)))])
    assert batch.max_seqlen <= 6
    assert model.encode_image(batch).shape == (2, 64)


def test_fixed_resolution_takes_no_patch_budget():
    with pytest.raises(ValueError, match="has a fixed resolution; max_num_patches is for"):
        create_model_and_transforms("siglip2-tiny-patch8-32", max_num_patches=9)
