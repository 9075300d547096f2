"""The page shows the boxes where they are, right and wrong, and trusts no caption."""

import base64
import io
import json

import pytest
import torch
from eval.test_report import ATTACK, Page, write_metrics
from eval.tiny_locca import scenes, speaker
from PIL import Image

from siglip2.cli import main
from siglip2.data.images import decode_image
from siglip2.errors import DataError
from siglip2.eval.locca import LocCaResult, evaluate_locca
from siglip2.eval.locca_examples import (
    FOUND,
    SIDE_PX,
    TRUE,
    LocCaExamples,
    collect_examples,
    draw_boxes,
    load_examples,
)
from siglip2.eval.report import write_report
from siglip2.eval.runner import EvalResult
from siglip2.locca.commands import answer
from siglip2.locca.tasks import box_to_text

WRONG = (0.0, 0.0, 0.1, 0.1)  # no scene has a picture this small
RECALLS = {f"{way}_r{k}": 0.25 for way in ("i2t", "t2i") for k in (1, 5, 10)}
RECALLS |= {f"chance_{way}_r{k}": 0.1 for way in ("i2t", "t2i") for k in (1, 5, 10)}


def scripted(result: LocCaResult) -> LocCaResult:
    """Of the examples' regions, in turn: the true box, a wrong one, none."""
    number = 0
    for example in result.examples:
        for region in example["regions"]:
            said = (box_to_text(tuple(region["box"])), box_to_text(WRONG), ATTACK)
            region["said_box"] = said[number % 3]
            number += 1
    assert number > 5
    return result


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run whose phrases, captions and source name attack the page."""
    folder = tmp_path_factory.mktemp("run")
    source = scenes()
    result = scripted(evaluate_locca(speaker(), source))
    name = f"held_out {ATTACK}"
    examples = collect_examples(speaker(), {name: source}, {name: result})
    for image in examples.sources[0].images:
        image["caption"] |= {"true": ATTACK, "language": ATTACK}
        for region in image["regions"]:
            region |= {"phrase": ATTACK, "language": ATTACK}
    examples.save(folder / "locca")
    found = {"num_images": 7, "languages": {}, "mean": {**RECALLS, "num_languages": 1}}
    EvalResult({"quickstart": {"all": found}}, 1, "CPU", locca={name: result}).write_json(
        folder / "eval.json"
    )
    write_metrics(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(300, 330, 10):
            row = {"step": step, "train/loss": 1.0, "train/sigmoid_loss": 0.5, "time_s": 1.0}
            row |= {"train/locca_loss": 0.5, "train/token_accuracy": step / 400}
            row |= {"val/x/locca/refer/accuracy": 0.25, "examples": 1}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def report(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def pictures(report: str) -> list[tuple[str, Image.Image]]:
    """What each picture is described as, and its pixels."""
    found = [a for tag, a in Page(report).tags if tag == "img"]
    start = "data:image/png;base64,"
    assert all(a["src"].startswith(start) for a in found)
    return [
        (a["alt"], Image.open(io.BytesIO(base64.b64decode(a["src"].removeprefix(start)))))
        for a in found
    ]


def test_boxes_of_the_page_are_where_they_are(run_dir, report):
    found = pictures(report)
    images = load_examples(run_dir / "locca").sources[0].images
    assert len(found) == len(images) == 7
    kinds = set()
    for (alt, picture), image in zip(found, images, strict=True):
        assert picture.size == (SIDE_PX, SIDE_PX)
        for region in image["regions"]:
            x0, y0, x1, y1 = (round(SIDE_PX * c) for c in region["box"])
            kinds.add(kind := "none" if region["found"] is None else region["right"])
            # A found box lies over the true one, its dashes begin at its corner: numbers from 0
            # to 500 move it by a pixel at most, less than a line is wide.
            assert picture.getpixel((x0 + 2, y0 + 2)) == (FOUND if kind is True else TRUE)
            assert picture.getpixel((x1 - 1, (y0 + y1) // 2)) in (TRUE, FOUND)
            assert picture.getpixel((x0 + 9, y0 + 9)) not in (TRUE, FOUND)
        if any(region["found"] == list(WRONG) for region in image["regions"]):
            assert picture.getpixel((0, 0)) == FOUND
            assert picture.getpixel((SIDE_PX // 10 - 1, 2)) == FOUND
        for word, is_in in (("wrong, overlap", False), ("right, overlap", True)):
            assert (word in alt) == any(
                region["right"] is is_in and region["found"] for region in image["regions"]
            )
    assert kinds == {True, False, "none"}


def test_whole_and_dashed_lines_on_a_picture_that_is_no_square():
    out = io.BytesIO()
    Image.new("RGB", (40, 20), "white").save(out, "PNG")
    data = draw_boxes(out.getvalue(), [((0.25, 0.0, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))])
    picture = decode_image(data)
    assert picture.size == (480, 240)
    top = [picture.getpixel((x, 0)) for x in range(480)]
    assert {x for x, colour in enumerate(top) if colour == TRUE} == set(range(120, 240))
    side = [picture.getpixel((479, y)) for y in range(240)]
    dashes = {y for y, colour in enumerate(side) if colour == FOUND}
    assert min(dashes) == 120
    assert max(dashes) == 239
    assert 40 < len(dashes) < 80
    assert picture.getpixel((179, 119)) == FOUND  # the centres, and a line between them
    assert picture.getpixel((269, 149)) == FOUND
    assert picture.getpixel((300, 200)) == (255, 255, 255)


def test_right_and_wrong_are_told_and_counted(run_dir, report):
    words = "".join(Page(report).words)
    regions = [
        x for image in load_examples(run_dir / "locca").sources[0].images for x in image["regions"]
    ]
    right = [x["said_box"] == box_to_text(tuple(x["box"])) for x in regions]
    assert [x["right"] for x in regions] == right
    assert f"{sum(right)} of these {len(regions)} boxes are right" in words
    assert "true box, whole line" in words
    assert words.count("(no box)") == sum(x["found"] is None for x in regions) > 0
    marks = [a["class"] for tag, a in Page(report).tags if tag == "span" and "left:" in str(a)]
    marks += [a["class"] for tag, a in Page(report).tags if tag == "span" and "right:" in str(a)]
    assert sorted(marks) == sorted("right" if x else "wrong" for x in right)


def test_numbers_stand_beside_their_baselines(run_dir, report):
    data = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    [found] = data["locca"].values()
    words = "".join(Page(report).words)
    for value in (
        f"best constant box {100 * found['refer']['constant_accuracy']:.0f} %",
        f"best constant box {found['refer']['constant_mean_iou']:.2f}",
        f"the commonest phrase {100 * found['ground']['constant_exact_any']:.0f} %",
        f"always the commonest {100 * found['captions']['mean']['unigram']:.0f} %",
        f"at each place {100 * found['captions']['mean']['by_place']:.0f} %",
        "Captions in 6 languages",
        "Baselines are the commonest of the evaluated captions' tokens.",
    ):
        assert value in words


def test_learning_curves_are_drawn(report):
    labels = [a["aria-label"] for tag, a in Page(report).tags if tag == "svg"]
    for title in ("Loss of the decoder", "Tokens right, in training", "Boxes found: x"):
        assert [label for label in labels if label.startswith(f"{title} against step")]


def test_words_are_text_and_nothing_is_fetched(report):
    page = Page(report)
    assert "<script" not in report
    assert "alert(1)" in "".join(page.words)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:image/"))


def test_captions_are_what_the_decoder_says(tmp_path):
    source = scenes()
    result = scripted(evaluate_locca(speaker(), source))
    examples = collect_examples(speaker(), {"x": source}, {"x": result})
    image = examples.sources[0].images[0]
    example = source[int(image["key"].split("-")[-1])]
    assert image["caption"]["said"] == answer(speaker(), [example.image], "caption", [""])[0]
    assert image["caption"]["true"] == example.captions[image["caption"]["language"]]
    assert [x["key"] for x in examples.sources[0].images] == [x["key"] for x in result.examples]
    assert collect_examples(None, {}, {}) == LocCaExamples([])


def test_the_true_caption_is_in_the_language_that_was_said(monkeypatch):
    source = scenes(1)
    result = evaluate_locca(speaker(), source)
    caption = source[0].captions["es"]
    monkeypatch.setattr(
        "siglip2.eval.locca_examples.answer", lambda *args, **options: [f"{caption.upper()}, x"]
    )
    [found] = collect_examples(speaker(), {"x": source}, {"x": result}).sources[0].images
    assert (found["caption"]["true"], found["caption"]["language"]) == (caption, "es")


def test_examples_come_back_from_their_files(tmp_path):
    source = scenes(3)
    result = evaluate_locca(speaker(), source)
    examples = collect_examples(speaker(), {"x": source}, {"x": result})
    for _ in range(2):
        examples.save(tmp_path / "out")
        assert load_examples(tmp_path / "out") == examples
    assert load_examples(tmp_path / "none") == LocCaExamples([])
    next((tmp_path / "out").glob("*.png")).unlink()
    with pytest.raises(DataError, match=r"cannot read .*examples\.json .*run the evaluation again"):
        load_examples(tmp_path / "out")


def test_numbers_alone_are_enough(run_dir, tmp_path):
    write_metrics(tmp_path)
    (tmp_path / "eval.json").write_bytes((run_dir / "eval.json").read_bytes())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Captions and boxes" in "".join(Page(text).words)
    assert pictures(text) == []


def write_other(folder, recall: float, **sources) -> None:
    folder.mkdir()
    mean = {**RECALLS, "i2t_r1": recall, "num_languages": 1}
    found = {"num_images": 7, "languages": {}, "mean": mean}
    sources = sources or {"quickstart": {"all": found}}
    EvalResult(sources, 1, "CPU").write_json(folder / "eval.json")


def test_both_runs_recalls_are_shown(run_dir, tmp_path, capsys):
    write_other(tmp_path / "without", 0.3)
    argv = ["report", str(run_dir), "--compare", str(tmp_path / "without")]
    assert main(argv) == 0
    assert f"report in {run_dir / 'report.html'}" in capsys.readouterr().out
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    row = text.split('id="compared"')[1].split("<tbody>")[1].split("</tbody>")[0]
    cells = [word for word in Page(row).words if word]
    assert cells == ["Quickstart", "7", "25.0", "30.0", "-5.0", "25.0", "25.0", "+0.0"]
    head = text.split('id="compared"')[1].split("<thead>")[1].split("</thead>")[0]
    names = [run_dir.name, "without", "difference"]
    assert Page(head).words == ["set", "images", "image to caption", "caption to image", *names * 2]


def test_runs_of_other_sets_are_not_compared(run_dir, tmp_path, capsys):
    write_other(tmp_path / "other", 0.3, coco={})
    argv = ["report", str(run_dir), "--compare", str(tmp_path / "other")]
    assert main(argv) != 0
    assert "need a run evaluated on a set of this run's to compare with" in capsys.readouterr().err
    assert main([*argv[:3], str(tmp_path / "none")]) != 0
    assert "has []" in capsys.readouterr().err


def test_a_seed_decides_what_is_shown_whatever_is_said():
    first = evaluate_locca(speaker(), scenes())
    torch.manual_seed(1)
    again = evaluate_locca(speaker(), scenes())
    assert again == first
