"""What is said of a decoder is what it said: by hand, and by the loss it was trained with."""

import json
import random

import numpy as np
import pytest
import torch
from eval.tiny import tokenize, write_folder
from eval.tiny_locca import LENGTH, scenes, speaker

from siglip2.config import EvalConfig
from siglip2.data.eval_loader import EvalLoader
from siglip2.data.regions import Region
from siglip2.data.sources import IndexedSource, open_source
from siglip2.data.tokenizer import get_tokenizer
from siglip2.errors import CheckpointError, DataError, TextError
from siglip2.eval.captioning import constant_accuracy
from siglip2.eval.localization import best_constant_accuracy, best_constant_iou
from siglip2.eval.locca import (
    LocCaResult,
    add_locca,
    evaluate_locca,
    find_speaker,
    look,
    make_speaker,
)
from siglip2.eval.runner import EvalResult, evaluate
from siglip2.eval.table import format_table
from siglip2.locca import save_decoder
from siglip2.locca.loss import CaptionLoss
from siglip2.locca.tasks import PREFIXES, box_to_text

LANGUAGES = 6


class Placed(IndexedSource):
    """The pictures of scenes with regions of our own, captions in one language."""

    def __init__(self, *regions: tuple[Region, ...]):
        super().__init__("placed")
        self.scenes, self.regions = scenes(len(regions)), regions

    def __len__(self):
        return len(self.regions)

    def __getitem__(self, i):
        found = self.scenes[i]
        captions = {"en": found.captions["en"]}
        return found._replace(key=str(i), captions=captions, regions=self.regions[i])


@pytest.fixture
def script(monkeypatch):
    """A decoder that answers a prompt by a table: the words given -> the words that follow."""
    answers: dict[str, str] = {}
    tokenizer = speaker().tokenizer

    def generate(decoder, vision, vision_lengths, prompts, *, eos_id):
        assert len(vision) == sum(vision_lengths)
        assert len(prompts) == len(vision_lengths)
        given = [tokenizer.decode(prompt).split(":") for prompt in prompts]
        return [tokenizer.encode([answers[words[1].strip()]])[0][:-1] for words in given]

    monkeypatch.setattr("siglip2.eval.grounding.generate", generate)
    return answers


LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)


def test_boxes_and_phrases_by_hand(script):
    dog, cat = {"en": "en1", "de": "en1"}, {"en": "en2", "de": "de2"}
    source = Placed(
        (Region(dog, LEFT), Region({"en": "en3"}, RIGHT)), (Region(cat, ALL),), (Region({}, ALL),)
    )
    script["en1"] = box_to_text(LEFT)  # right
    script["en3"] = box_to_text((0.75, 0.0, 1.0, 1.0))  # half of it: just right
    script["en2"] = script["de2"] = "400 300 100 200"  # inverted
    script[box_to_text(LEFT)] = "en1"
    script[box_to_text(RIGHT)] = "en1"
    script[box_to_text(ALL)] = "DE2"  # what it is called in another language than was drawn
    found = evaluate_locca(speaker(), source, batch_size=2, max_images=3)
    assert found.num_images == 3
    true = torch.tensor([LEFT, RIGHT, ALL], dtype=torch.float64)
    assert found.refer == {
        "num_regions": 3,
        "accuracy": pytest.approx(2 / 3),
        "constant_accuracy": best_constant_accuracy(true),
        "mean_iou": pytest.approx(1.5 / 3),
        "constant_mean_iou": best_constant_iou(true),
        "are_boxes": pytest.approx(2 / 3),
    }
    assert found.refer["constant_accuracy"] == 1.0  # of the whole picture, at one half
    assert found.refer["constant_mean_iou"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    drawn = {x["phrase"] for example in found.examples for x in example["regions"]}
    assert drawn == {"en1", "en2", "en3"}
    assert found.ground == {
        "num_regions": 3,
        "exact": pytest.approx(1 / 3),
        "constant_exact": pytest.approx(1 / 3),
        "exact_any": pytest.approx(2 / 3),
        "constant_exact_any": pytest.approx(1 / 3),
    }


def test_a_phrase_too_long_to_answer_is_a_miss(script):
    long = " ".join(["en1"] * LENGTH)
    source = Placed((Region({"en": long}, LEFT), Region({"en": "en3"}, RIGHT)))
    script |= {"en3": box_to_text(RIGHT), box_to_text(LEFT): "en1", box_to_text(RIGHT): "en3"}
    found = evaluate_locca(speaker(), source)
    assert (found.refer["accuracy"], found.refer["are_boxes"]) == (0.5, 0.5)
    assert found.ground["exact"] == 0.5


def test_captions_are_scored_as_in_training():
    """One batch of one language: the numbers of the training loss, without its backward."""
    _, decoder, tokenizer, transform = speaker()
    source = Placed(*[()] * 5)
    found = evaluate_locca(speaker(), source, batch_size=5)
    [batch] = EvalLoader(source, transform, batch_size=5)
    loss = CaptionLoss(decoder, parallel_share=0.0)
    with torch.no_grad():
        vision, lengths = look(speaker(), batch.image)
        texts = [caption["en"] for caption in batch.captions]
        packed = loss.pack(texts, lengths, tokenizer, rng=np.random.default_rng(0))
        expected = loss(vision, packed)
    values = found.captions["languages"]["en"]
    assert values["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert values["accuracy"] == pytest.approx(float(expected.token_accuracy))
    assert values["num_tokens"] == len(packed.counted)
    # "Cap:" is given: the tokens are the caption's and its end
    assert values["num_tokens"] == sum(map(len, tokenizer.encode(texts)))
    assert found.captions["mean"] == {
        "num_languages": 1,
        **{name: values[name] for name in ("accuracy", "loss", "unigram", "by_place")},
    }
    assert (found.refer, found.ground) == ({}, {})


def test_a_decoder_that_knows_a_caption_has_no_wrong_token():
    """Places alone decide, as in tests/locca: one text, known by heart, and another."""
    model, decoder, tokenizer, transform = speaker()
    texts = ["en1 left top", "en2 right"]
    ids = tokenizer.encode([PREFIXES["caption"]])[0][:-1] + tokenizer.encode(texts[:1])[0]
    known = type(decoder)(decoder.config)
    width = decoder.config.size.width
    with torch.no_grad():
        for parameter in known.parameters():
            parameter.zero_()
        known.norm.weight.fill_(1)
        known.posemb.copy_(torch.eye(LENGTH, width))
        for place, token in enumerate(ids):
            known.own_head[token, place] += 10

    class Two(Placed):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(captions={"en": texts[i]})

    asked = make_speaker(model, known, tokenizer, transform)
    one = evaluate_locca(asked, Two((), ()), max_images=1).captions["languages"]["en"]
    assert one["accuracy"] == 1.0
    assert one["loss"] < 1e-3
    both = evaluate_locca(asked, Two((), ())).captions["languages"]["en"]
    first, second = (tokenizer.encode([text])[0] for text in texts)
    right = len(first) + sum(a == b for a, b in zip(first, second, strict=False))
    assert both["accuracy"] == pytest.approx(right / (len(first) + len(second)))


def test_blind_guesses_by_hand():
    texts = [(5, 7, 1), (5, 8, 1), (5, 5, 9, 1)]
    assert constant_accuracy(texts, texts, by_place=False) == pytest.approx(4 / 10)  # 5
    # 5; then one of 5, 7, 8; then 1, which is commoner than 9; then 1
    assert constant_accuracy(texts, texts, by_place=True) == pytest.approx((3 + 1 + 2 + 1) / 10)
    seen = [(8, 8)]  # nothing at the third place: what is commonest anywhere
    assert constant_accuracy(texts, seen, by_place=True) == pytest.approx(1 / 10)
    assert constant_accuracy(texts, [], by_place=False) == 0


def test_baselines_of_training_captions():
    source = Placed((), ())
    tokenizer = speaker().tokenizer
    own = evaluate_locca(speaker(), source).captions
    texts = [tuple(tokenizer.encode([source[i].captions["en"]])[0]) for i in range(2)]
    assert own["baseline"] == "evaluated"
    assert own["mean"]["unigram"] == constant_accuracy(texts, texts, by_place=False)
    assert own["mean"]["by_place"] == constant_accuracy(texts, texts, by_place=True)
    trained = [{"en": "top"}, {"de": "unten"}]
    found = evaluate_locca(speaker(), source, train_captions=trained).captions
    assert found["baseline"] == "training"
    seen = [tuple(tokenizer.encode(["top"])[0])]
    assert found["mean"]["by_place"] == constant_accuracy(texts, seen, by_place=True)
    other = evaluate_locca(speaker(), source, train_captions=trained[1:]).captions
    seen = [tuple(tokenizer.encode(["unten"])[0])]  # no caption of the language: any
    assert other["mean"]["unigram"] == constant_accuracy(texts, seen, by_place=False)


def test_batches_change_nothing_and_a_seed_asks_for_other_phrases():
    whole = evaluate_locca(speaker(), scenes(), batch_size=7)
    lines = []
    parts = evaluate_locca(speaker(), scenes(), batch_size=3, progress=lines.append)
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["3 images", "6 images", "7 images"]
    assert parts.examples == whole.examples
    assert (parts.refer, parts.ground) == (whole.refer, whole.ground)
    assert len(whole.captions["languages"]) == LANGUAGES
    for name, value in whole.metrics().items():
        assert parts.metrics()[name] == pytest.approx(value, rel=1e-5)
    first = {x["regions"][0]["language"] for x in whole.examples}
    assert len(first) > 3  # drawn for each image by itself
    asked = lambda result: [x["phrase"] for e in result.examples for x in e["regions"]]
    other = evaluate_locca(speaker(), scenes(), seed=1)
    assert sorted(asked(other)) != sorted(asked(whole))
    assert len(asked(other)) == len(asked(whole)) == whole.refer["num_regions"]


def test_examples_are_drawn_without_a_look_at_the_answers():
    result = evaluate_locca(speaker(), scenes(20), max_images=20)
    keys = [f"held-out-{i}" for i in range(20)]
    assert [x["key"] for x in result.examples] == random.Random(0).sample(keys, 12)
    for example in result.examples:
        regions = scenes(20)[int(example["key"].split("-")[-1])].regions
        assert [tuple(x["box"]) for x in example["regions"]] == [r.box for r in regions]


def test_result_comes_back_from_json():
    result = evaluate_locca(speaker(), scenes(3))
    data = json.loads(json.dumps(result.to_dict()))
    assert LocCaResult.from_dict(data) == result
    metrics = result.metrics()
    assert metrics["refer/accuracy"] == result.refer["accuracy"]
    assert metrics["captions/en/loss"] == result.captions["languages"]["en"]["loss"]
    assert "captions/mean/accuracy" in metrics
    with pytest.raises(DataError, match=r"no result of a decoder .*: run the evaluation again"):
        LocCaResult.from_dict({"boxes": 3})


def test_numbers_stand_beside_retrieval(tmp_path):
    model, _, tokenizer, transform = speaker()
    sources, config = {"x": scenes(4)}, EvalConfig(batch_size=2, max_images=3)
    short = get_tokenizer(tokenizer, text_length=16)
    bare = evaluate(model, sources, transform, short, config)
    result = add_locca(bare, speaker(), sources, config)
    assert result.sources == bare.sources
    assert result.locca["x"] == evaluate_locca(speaker(), sources["x"], max_images=3)
    assert result.metrics()["val/x/locca/refer/accuracy"] == result.locca["x"].refer["accuracy"]
    data = json.loads(result.write_json(tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert data["locca"]["x"]["refer"] == result.locca["x"].refer
    assert add_locca(bare, None, sources, config) is bare
    assert "Caption tokens" not in format_table(bare)
    table = format_table(result)
    assert table.startswith(format_table(bare))
    lines = [line.split() for line in table.splitlines()]
    mean = result.locca["x"].captions["mean"]
    shares = [f"{100 * mean[name]:.1f}" for name in ("accuracy", "unigram", "by_place")]
    assert ["x", "mean", "of", str(LANGUAGES), f"{mean['loss']:.3f}", *shares] in lines
    boxes = result.locca["x"].refer
    numbers = [f"{100 * boxes[name]:.1f}" for name in ("accuracy", "constant_accuracy")]
    assert ["x", "refer", "Acc@0.5", str(boxes["num_regions"]), *numbers] in lines
    only = format_table(result, language="es").split("Caption tokens")[1]
    assert "\nx       es" in only
    assert "\nx       de" not in only


def test_a_source_without_regions_has_captions_alone(tmp_path):
    found = evaluate_locca(speaker(), open_source(str(write_folder(tmp_path / "colours"))))
    assert found.refer == found.ground == {}
    assert {x for x, v in found.captions["languages"].items() if not v["in_mean"]} == {"sw"}
    assert len(found.examples) == 12
    result = EvalResult({}, 0, "CPU", locca={"colours": found})
    assert "Boxes of phrases" not in format_table(result)


def test_a_decoder_is_found_in_its_folder(tmp_path):
    model, decoder, tokenizer, transform = speaker()
    assert find_speaker(tmp_path, model, tokenizer, transform) is None
    save_decoder(decoder, tmp_path)
    found = find_speaker(tmp_path, model, tokenizer, transform)
    assert torch.equal(found.decoder.head, decoder.head)
    (tmp_path / "decoder.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not describe a decoder"):
        find_speaker(tmp_path, model, tokenizer, transform)


def test_wrong_input_is_one_clear_error():
    model, decoder, _, transform = speaker()
    with pytest.raises(TextError, match=r"need a tokenizer that a decoder can speak, .* got Wrapp"):
        evaluate_locca(make_speaker(model, decoder, tokenize, transform), scenes(2))

    class Mute(Placed):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(captions={})

    with pytest.raises(DataError, match=r"need captions or regions .* 'placed' has neither"):
        evaluate_locca(speaker(), Mute(()))
