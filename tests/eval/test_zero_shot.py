"""Zero-shot classification against the protocol written out by hand."""

import json
import math

import pytest
import torch
from eval.tiny import tiny_model, tokenize

from siglip2.errors import DataError
from siglip2.eval.zero_shot import (
    canonicalize,
    classes_from_captions,
    classify,
    read_classes,
    targets,
    top_k_accuracy,
    zero_shot_classifier,
)

NAMES = ("Great_White-Shark", "tench", "stop sign")
TEMPLATES = ("{}", "A photo of a {}.", "itap of my {}!")


def test_classifier_is_the_normalised_mean_of_unit_prompts():
    model = tiny_model()
    with torch.inference_mode():
        columns = []
        for name in ("great whiteshark", "tench", "stop sign"):
            prompts = [name, f"a photo of a {name}", f"itap of my {name}"]
            z = model.encode_text(tokenize(prompts)).float()
            mean = (z / z.norm(dim=1, keepdim=True)).mean(0)
            columns.append(mean / mean.norm())
    expected = torch.stack(columns, dim=1)
    for batch_size in (2, 256):
        found = zero_shot_classifier(model, NAMES, TEMPLATES, tokenize, batch_size=batch_size)
        assert torch.allclose(found, expected, atol=1e-6)


def test_templates_may_be_functions():
    model = tiny_model()
    functions = [lambda c, t=t: t.replace("{}", c) for t in TEMPLATES]
    assert torch.equal(
        zero_shot_classifier(model, NAMES, functions, tokenize),
        zero_shot_classifier(model, NAMES, TEMPLATES, tokenize),
    )


def test_a_template_needs_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"need '\{\}' in each template.*got 'a photo'"):
        zero_shot_classifier(tiny_model(), NAMES, ["a photo"], tokenize)


def test_needs_classes():
    with pytest.raises(ValueError, match="got 0 names, 3 templates"):
        zero_shot_classifier(tiny_model(), [], TEMPLATES, tokenize)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Great_White  Shark.", "great white shark"),
        ("man: dark skin", "man dark skin"),
        ("  ÉTÉ! ", "été"),
        ("赤い 車", "赤い 車"),
    ],
)
def test_canonicalize(text, expected):
    assert canonicalize(text) == expected


def test_activations_follow_their_definitions():
    img = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    classifier = torch.eye(2)
    log_scale, bias = torch.tensor(math.log(10.0)), torch.tensor(-10.0)
    z = 10 * img - 10
    shares = classify(img, classifier, log_scale, bias)
    assert torch.allclose(shares, z.softmax(1))
    assert torch.allclose(shares, classify(img, classifier, log_scale, torch.tensor(3.0)))
    alone = classify(img, classifier, log_scale, bias, activation="sigmoid")
    assert torch.allclose(alone, 1 / (1 + (-z).exp()))
    with pytest.raises(ValueError, match="got 'tanh'"):
        classify(img, classifier, log_scale, bias, activation="tanh")


def test_accuracy_counts_ties_as_wrong():
    classifier = torch.eye(3)
    img = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1.0], [0, 0, 1.0]])
    found = top_k_accuracy(img, classifier, torch.tensor([0, 0, 2, 1]), ks=(1, 2, 3))
    assert found == {1: 0.5, 2: 0.75, 3: 1.0}
    same = torch.ones(2, 3) / 3**0.5
    assert top_k_accuracy(same, same.T, torch.tensor([0, 1]), ks=(1,)) == {1: 0.0}


def test_reads_classes_as_a_list_or_as_labels_with_names(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert read_classes(path) == (("cat", "dog"), ("cat", "dog"), ("{}",))
    path.write_text(json.dumps({"classes": {"n1": "cat"}, "templates": ["a {}"]}))
    assert read_classes(path) == (("n1",), ("cat",), ("a {}",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'need {"classes"'),
        ('{"classes": []}', 'need {"classes"'),
        ('{"classes": ["a"], "templates": []}', 'need {"classes"'),
        ('{"classes": [1]}', 'need {"classes"'),
        (None, "no file"),
    ],
)
def test_says_what_a_class_file_should_be(tmp_path, text, message):
    path = tmp_path / "classes.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=f"eval.classes: .*{message}"):
        read_classes(path)


def test_targets_match_labels_names_and_captions(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": {"n1": "Stop_sign", "n2": "cat"}}))
    captions = [{"en": "x"}, {"en": "stop sign"}, {"und": "Cat!"}, {"en": "dog"}]
    found = targets(read_classes(path), captions, ["n2", "g1", "g2", "g3"])
    assert found.tolist() == [1, 0, 1, -1]


def test_classes_from_captions_are_distinct():
    captions = [{"en": "Cat"}, {"en": "cat", "de": "Katze"}, {"de": "Hund"}]
    assert classes_from_captions(captions, "en").names == ("cat",)
    with pytest.raises(DataError, match="no caption in language 'fr'"):
        classes_from_captions(captions, "fr")
