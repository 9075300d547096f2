"""OWLv2 as a detector: a tiny one with random weights says through it what it says by itself."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2.cli import main
from siglip2.data.owlv2 import Owlv2
from siglip2.data.sources import iterate, open_source
from siglip2.errors import CheckpointError, ConfigError, MissingDependencyError

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
PHRASES = ["cat", "dog", "red cat", "a dog on a cat", "tac", "god"]


def _tokenizer(folder):
    """CLIP's byte-level tokenizer with single letters for words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|start|>", "<|end|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="<|start|>",
        eos_token="<|end|>",
        unk_token="<|end|>",
        pad_token="!",
        model_max_length=16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owlv2")
    tokenizer = _tokenizer(folder)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    config = transformers.Owlv2Config(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 0,
        },
        vision_config={**shared, "image_size": 48, "patch_size": 8},
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = transformers.Owlv2ForObjectDetection(config)
    with torch.no_grad():  # spread: random weights alone say much the same of every place
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    size = {"height": 48, "width": 48}
    images = transformers.Owlv2ImageProcessor(size=size)
    transformers.Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[(60, 90), (90, 30)], ids=["wide", "tall"])
def image(request):
    pixels = np.random.default_rng(0).integers(0, 256, (*request.param, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_itself(folder, image, phrases, threshold):
    processor = transformers.Owlv2Processor.from_pretrained(folder)
    model = transformers.Owlv2ForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(text=[phrases], images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    [found] = processor.post_process_grounded_object_detection(
        outputs, threshold=threshold, target_sizes=[(image.height, image.width)]
    )
    return found


@pytest.mark.parametrize("phrases_at_a_time", [256, 4, 1])
def test_equals_the_model_by_itself(folder, image, phrases_at_a_time):
    detect = Owlv2(folder, phrases_at_a_time=phrases_at_a_time, device="cpu")
    found = list(detect(image, PHRASES))
    expected = by_itself(folder, image, PHRASES, 0.0)
    assert len(found) == 36
    labels, scores, boxes = zip(*found, strict=True)
    assert list(labels) == expected["labels"].tolist()
    assert len(set(labels)) > 1
    torch.testing.assert_close(torch.tensor(scores), expected["scores"])
    torch.testing.assert_close(torch.tensor(boxes), expected["boxes"])


def test_boxes_are_in_pixels_of_the_picture_not_of_its_square(folder, image):
    """A picture and its square, padded below and on the right as the processor does, are one."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, (0, 0))
    detect = Owlv2(folder, device="cpu")
    assert list(detect(image, PHRASES)) == list(detect(square, PHRASES))


def test_the_threshold_and_the_prompt_count(folder, image):
    scores = [score for _, score, _ in Owlv2(folder, device="cpu")(image, PHRASES)]
    middle = float(np.median(scores))
    above = list(Owlv2(folder, threshold=middle, device="cpu")(image, PHRASES))
    assert len(above) == sum(score > middle for score in scores)
    asked = list(Owlv2(folder, prompt="a {}", device="cpu")(image, ["cat"]))
    assert asked == list(Owlv2(folder, device="cpu")(image, ["a cat"]))
    with pytest.raises(ConfigError, match=r"need a prompt with {} where the phrase goes; got 'a'"):
        Owlv2(folder, prompt="a")


def test_phrases_that_are_too_long_are_not_asked(folder, image):
    detect = Owlv2(folder, device="cpu")
    long = "abcdefghijklmnop"  # 16 tokens and those at its ends
    found = list(detect(image, [long, "cat", long, "dog"]))
    expected = [((1, 3)[i], *rest) for i, *rest in detect(image, ["cat", "dog"])]
    assert found == expected
    assert list(detect(image, [long])) == list(detect(image, [])) == []


def test_a_folder_without_owlv2_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="need a folder with an OWLv2 model and its"):
        Owlv2(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "owlvit"}))
    with pytest.raises(CheckpointError, match="it is a model of the type 'owlvit'"):
        Owlv2(tmp_path)


def test_missing_packages_are_named(folder, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_torchvision_available", lambda: False)
    for package in ("scipy", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        message = rf"needs the package '{package}': pip install 'siglip2\[boxes\]'"
        with pytest.raises(MissingDependencyError, match=message):
            Owlv2(folder)


def test_the_command_runs_it(folder, image, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image.save(pictures / "a.png")
    (pictures / "a.txt").write_text("a cat on a red dog")
    out = tmp_path / "out"
    argv = ["data", "boxes", str(pictures), str(out), "--detector", str(folder)]
    options = ["--threshold", "0.01", "--max-boxes", "5", "--device", "cpu", "--max-words", "2"]
    assert main([*argv, *options, "--overlap", "1"]) == 0
    assert "images 1 (0 without boxes)" in capsys.readouterr().out
    [example] = iterate(open_source(str(out / "boxes-*.tar")))
    phrases = ["cat", "red", "red dog", "dog"]
    sides = np.array((image.width, image.height) * 2)
    expected = []
    for index, score, box in Owlv2(folder, device="cpu")(image, phrases):
        x0, y0, x1, y1 = within = np.clip(box, 0, sides)
        if score >= 0.01 and min(x1 - x0, y1 - y0) >= 1:
            expected.append((score, phrases[index], within))
    expected.sort(key=lambda found: -found[0])
    assert expected
    assert len(example.regions) == min(len(expected), 5)
    for region, (_, phrase, box) in zip(example.regions, expected, strict=False):
        assert region.phrases == {"und": phrase}
        assert np.abs(np.array(region.box) * sides - box).max() < 0.01  # written with two decimals
