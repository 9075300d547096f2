"""What `save_pretrained` writes beside the weights, read by transformers' Auto classes."""

import json

import numpy as np
import pytest
import torch
from models.tiny import random_model, tiny_architecture

from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.data.tokenizer import get_tokenizer
from siglip2.data.train_tokenizer import train_tokenizer
from siglip2.models.factory import create_model, save_pretrained
from siglip2.models.inputs import HF_KEYS
from siglip2.models.presets import ARCHITECTURES

transformers = pytest.importorskip("transformers", exc_type=ImportError)

CAPTIONS = [
    "A Red Bus",
    "two cats on a mat, one asleep",
    "",
    "ÉCOLE <eos> Straße",
    "红色的公共汽车",
    "many " * 40,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=320, text_length=12)


@pytest.fixture(scope="module")
def gemma_shaped(tmp_path_factory):
    """Normalisation and splitting as in Gemma's tokenizer.json, over a small vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    made.train_from_iterator([caption.lower() for caption in CAPTIONS], trainer)
    path = tmp_path_factory.mktemp("gemma") / "tokenizer.json"
    made.save(str(path))
    return get_tokenizer(path, text_length=12)


def save(tokenizer, folder, *, is_naflex=False):
    architecture = tiny_architecture(
        vocab_size=tokenizer.vocab_size, length=12, is_naflex=is_naflex, patch_size=8
    )
    model = random_model(architecture)
    save_pretrained(model, folder, tokenizer=tokenizer)
    return model


def assert_same_ids(theirs, ours):
    out = theirs(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    assert set(out) == {"input_ids"}
    assert torch.equal(out["input_ids"], ours(CAPTIONS))


def test_auto_tokenizer_of_a_fixed_model_gives_our_ids(tokenizer, tmp_path):
    save(tokenizer, tmp_path)
    assert_same_ids(transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer)


def test_auto_tokenizer_of_a_naflex_model_gives_gemmas_ids(gemma_shaped, tmp_path):
    save(gemma_shaped, tmp_path, is_naflex=True)
    assert_same_ids(transformers.AutoTokenizer.from_pretrained(tmp_path), gemma_shaped)


def test_naflex_model_with_a_vocabulary_of_its_own_names_the_class(tokenizer, tmp_path):
    """For model_type siglip2, AutoTokenizer builds Gemma's splitting whatever the file says."""
    save(tokenizer, tmp_path, is_naflex=True)
    assert_same_ids(transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), tokenizer)


def test_our_tokenizer_reads_its_export_back(tokenizer, tmp_path):
    save(tokenizer, tmp_path / "first")
    again = get_tokenizer(tmp_path / "first", text_length=12)
    assert torch.equal(again(CAPTIONS), tokenizer(CAPTIONS))
    save(again, tmp_path / "second")
    files = [(tmp_path / folder / "tokenizer.json").read_text() for folder in ("first", "second")]
    assert files[0] == files[1]


@pytest.mark.parametrize("is_naflex", [False, True], ids=["fixed", "naflex"])
def test_auto_processor_and_model_embed_as_we_do(is_naflex, gemma_shaped, tmp_path):
    from PIL import Image

    model = save(gemma_shaped, tmp_path, is_naflex=is_naflex)
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 70, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise[0]), Image.fromarray(noise[1]).crop((0, 0, 20, 40))]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    # Siglip2Processor puts its own 64 ids and 256 patches of 16 before what the files say.
    ours = {"max_length": 12, "max_num_patches": 16, "patch_size": 8} if is_naflex else {}
    inputs = processor(
        text=CAPTIONS[:2],
        images=pictures,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        **ours,
    )
    vision = model.architecture.vision
    if is_naflex:
        transform = NaflexTransform(vision.patch_size, vision.grid_size**2)
    else:
        transform = FixedTransform(vision.image_size)
    batch = transform.collate([transform(picture) for picture in pictures])
    pixels = inputs["pixel_values"]
    if is_naflex:
        pixels = pixels[inputs["pixel_attention_mask"].bool()]
        batch = batch.patches / 127.5 - 1
    # Their processor resizes with Pillow, ours with torch: at most 2 grey levels apart.
    assert (batch - pixels).abs().max() < 2.5 / 127.5
    image = {key: inputs[key] for key in HF_KEYS} if is_naflex else pixels
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(**inputs)
        actual = model(image=image, text=gemma_shaped(CAPTIONS[:2]))
    assert torch.equal(inputs["input_ids"], gemma_shaped(CAPTIONS[:2]))
    for name, x in (("image", expected.image_embeds), ("text", expected.text_embeds)):
        error = (actual[f"{name}_features"] - x).abs().max()
        assert error < 256 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_config_describes_every_released_model(name, tmp_path):
    """transformers builds, from our config alone, a model with exactly our parameters' number."""
    from siglip2.models.siglip2 import Siglip2
    from siglip2.models.weights import hf
    from siglip2.models.weights.hf_files import config_files
    from siglip2.models.weights.rules import export_state

    with torch.device("meta"):
        ours = Siglip2(ARCHITECTURES[name])
    content = config_files(ours.architecture)["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(config)
    shapes = lambda state: {n: tuple(x.shape) for n, x in state.items()}
    exported = export_state(hf.rules(ours.architecture), ours.state_dict())
    assert shapes(exported) == shapes(theirs.state_dict())
    assert theirs.text_model.encoder.layers[0].layer_norm1.eps == 1e-6


def test_defaults_left_out_of_published_configs_are_filled_in(tmp_path):
    """Published config.json files hold what differs from transformers' defaults alone."""
    from siglip2.models.factory import from_pretrained

    model = create_model("siglip2-tiny-patch8-32", vocab_size=9)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert from_pretrained(tmp_path / "again").architecture == model.architecture
    config = json.loads((tmp_path / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        for key in ("hidden_act", "layer_norm_eps", "attention_dropout"):
            del config[tower][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path).architecture == model.architecture
