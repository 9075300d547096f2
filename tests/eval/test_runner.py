"""The whole evaluation on a small folder."""

import json
import math

import pytest
import torch
from eval.tiny import LANGUAGES, tiny_model, tokenize, write_folder

from siglip2.config import EvalConfig
from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.data.sources import open_source
from siglip2.errors import DataError
from siglip2.eval.embed import same_picture
from siglip2.eval.retrieval import retrieval_recall
from siglip2.eval.runner import evaluate
from siglip2.eval.table import format_table
from siglip2.models import presets
from siglip2.models.siglip2 import Siglip2

TRANSFORM = FixedTransform(32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(str(write_folder(tmp_path_factory.mktemp("data") / "colours")))


def run(source, model=None, **config):
    return evaluate(
        model or tiny_model(),
        {"held_out": source},
        TRANSFORM,
        tokenize,
        EvalConfig(batch_size=5, **config),
    )


def test_recalls_are_those_of_the_embeddings(source):
    model = tiny_model()
    result = run(source, model)
    examples = [source[i] for i in range(len(source))]
    flat = [x for x in examples if x.subset == "flat"]
    with torch.inference_mode():
        model.eval()
        img = model.encode_image(torch.stack([TRANSFORM(x.image) for x in flat]), normalize=True)
        txt = model.encode_text(tokenize([x.captions["ru"] for x in flat]), normalize=True)
    groups = [x.group for x in flat]
    expected = retrieval_recall(img, txt, groups, groups)
    found = result.sources["held_out"]["flat"]["languages"]["ru"]
    assert [found[f"i2t_r{k}"] for k in (1, 5, 10)] == [expected.i2t[k] for k in (1, 5, 10)]
    assert [found[f"t2i_r{k}"] for k in (1, 5, 10)] == [expected.t2i[k] for k in (1, 5, 10)]
    assert (found["num_images"], found["num_texts"]) == (6, 6)


def test_subsets_and_languages_apart_and_a_rare_language_not_in_the_mean(source):
    result = run(source)
    assert set(result.sources["held_out"]) == {"flat", "framed"}
    found = result.sources["held_out"]["flat"]
    assert set(found["languages"]) == {"en", "sw", *LANGUAGES}
    assert {x for x, v in found["languages"].items() if not v["in_mean"]} == {"sw"}
    assert found["mean"]["num_languages"] == 5
    metrics = result.metrics()
    counted = [metrics[f"val/held_out/flat/{x}/i2t_r5"] for x in ("en", *LANGUAGES)]
    assert metrics["val/held_out/flat/mean/i2t_r5"] == pytest.approx(sum(counted) / 5)


def test_result_is_written_whole(source, tmp_path):
    result = run(source)
    path = result.write_json(tmp_path / "eval.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["metrics"] == result.metrics()
    assert data["num_parameters"] == sum(p.numel() for p in tiny_model().parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_comes_back(source, training):
    model = tiny_model().train(training)
    seen = []
    model.vision.register_forward_hook(lambda module, *_: seen.append(module.training))
    run(source, model)
    assert model.training is training
    assert seen
    assert not any(seen)
    assert model.vision.training is training


def test_one_picture_in_several_rows_is_one_image(tmp_path):
    """Five captions of a picture as five rows: recall at 5 must not be recall at 1."""
    folder = write_folder(tmp_path / "colours")
    rows = [
        json.dumps({"image": f"flat-{name}.png", "caption": f"{name} {n}", "group": name})
        for name in ("red", "green", "blue", "black", "white", "grey")
        for n in range(5)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = run(open_source(str(folder / "rows.jsonl"))).sources["held_out"]["all"]
    values = found["languages"]["und"]
    assert (values["num_images"], values["num_texts"]) == (6, 30)
    assert values["chance_t2i_r5"] == pytest.approx(5 / 6)


def test_same_picture_needs_the_group_and_the_embedding():
    img = torch.eye(3)[[0, 0, 1, 0, 1]]
    img[1] += 1e-7
    assert same_picture(img, ["a", "a", "a", "b", "a"]) == [0, 0, 2, 3, 2]


def test_two_concepts_of_one_name_share_a_text(tmp_path):
    folder = write_folder(tmp_path / "colours")
    for name in ("flat-black", "flat-white"):
        record = {"captions": {"en": "Mono"}, "group": name, "subset": "flat"}
        (folder / f"{name}.json").write_text(json.dumps(record))
    values = run(open_source(str(folder))).sources["held_out"]["flat"]["languages"]["en"]
    assert (values["num_images"], values["num_texts"]) == (6, 5)
    assert values["chance_t2i_r1"] == pytest.approx((4 * 1 / 6 + 2 / 6) / 5)


def test_zero_shot_from_a_file_and_from_captions(source, tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": ["red", "green"], "templates": ["a {}", "{}"]}))
    found = run(source, classes=str(path)).sources["held_out"]["flat"]["zero_shot"]
    assert (found["num_images"], found["num_without_class"], found["num_classes"]) == (2, 4, 2)
    assert found["chance_top1"] == 0.5
    assert 0 < found["softmax_probability"] < 1
    sigmoid = run(source, classes=str(path), activation="sigmoid").sources["held_out"]["flat"]
    # At a bias of -10 an untrained model calls no pair likely; two shares are near one half.
    assert sigmoid["zero_shot"]["sigmoid_probability"] < 0.1 < found["softmax_probability"]
    found = run(source, classes="captions:en").sources["held_out"]["flat"]
    assert found["zero_shot"]["top1"] == found["languages"]["en"]["i2t_r1"]
    assert "zero_shot" not in run(source).sources["held_out"]["flat"]


def test_table_has_a_line_for_each_counted_language(source):
    text = format_table(run(source))
    assert text.count("held_out") == 2 * (1 + 5 + 1)
    assert "mean of 5" in text
    assert "(1 more)" in text
    only = format_table(run(source), language="sw")
    assert only.count("held_out") == 4
    assert "sw" in only


def test_a_diverged_model_is_said_to_be_one(source):
    model = tiny_model()
    torch.nn.init.constant_(next(model.vision.parameters()), math.nan)
    with pytest.raises(ValueError, match="need finite image embeddings; 6 of 6"):
        run(source, model)


def test_an_image_limit_and_progress(source):
    lines = []
    config = EvalConfig(batch_size=2, max_images=4)
    result = evaluate(
        tiny_model(), {"x": source}, TRANSFORM, tokenize, config, progress=lines.append
    )
    assert lines == ["evaluating x: 2 images", "evaluating x: 4 images"]
    assert result.sources["x"]["flat"]["num_images"] == 4


def test_a_source_without_a_readable_image(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError):
        run(open_source(str(tmp_path)))


def test_a_naflex_model_is_evaluated_at_each_budget(source):
    torch.manual_seed(0)
    model = Siglip2(presets.architecture("siglip2-tiny-patch8-naflex"))
    model.init_weights()
    transform = NaflexTransform(8, 16)
    config = EvalConfig(batch_size=5, budgets=(4, 16), classes="captions:en")
    args = (model, {"held_out": source}, transform, tokenize, config)
    result = evaluate(*args, seen_budgets=(16,))
    rows = {(row["budget"], row["subset"]): row for row in result.budgets}
    assert set(rows) == {(n, subset) for n in (4, 16) for subset in ("flat", "framed")}
    assert [rows[n, "flat"]["seen"] for n in (4, 16)] == [False, True]
    assert [rows[n, "flat"]["num_patches"] for n in (4, 16)] == [4.0, 16.0]
    usual = result.sources["held_out"]["flat"]  # at the transform's own budget, 16
    assert rows[16, "flat"]["mean"] == usual["mean"]
    assert rows[16, "flat"]["zero_shot"] == usual["zero_shot"]
    assert result.metrics()["val/held_out/flat/at_16/i2t_r1"] == usual["mean"]["i2t_r1"]
    table = format_table(result).splitlines()
    at = table.index("At each number of patches an image may have:")
    assert [line.split()[:3] for line in table[at + 2 :]] == [
        [str(n), "yes" if n == 16 else "no", f"{n}.0"] for n in (4, 4, 16, 16)
    ]
    assert json.loads(json.dumps(result.to_dict()))["budgets"] == result.budgets


def test_budgets_need_a_naflex_model(source):
    with pytest.raises(DataError, match=r"eval\.budgets are for NaFlex models"):
        run(source, budgets=(4,))
