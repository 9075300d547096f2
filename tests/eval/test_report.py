"""The page is made of files, fetches nothing and trusts no caption."""

import json
import re
from html.parser import HTMLParser

import pytest
from eval.tiny import LANGUAGES, tiny_model, tokenize, write_folder

from siglip2.config import EvalConfig
from siglip2.data.images import FixedTransform
from siglip2.data.sources import open_source
from siglip2.errors import DataError
from siglip2.eval.gallery import (
    Gallery,
    choose_languages,
    collect_gallery,
    load_gallery,
    script_of,
)
from siglip2.eval.report import write_report
from siglip2.eval.runner import evaluate

ATTACK = "<script>alert(1)</script><img src=http://evil.example/x onerror='a()'>\"quoted\" & 'more'"
VOID = {"meta", "img", "line", "polyline", "br", "path"}


class Page(HTMLParser):
    """Every tag, its attributes, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def write_metrics(folder, num_rows: int = 30) -> None:
    rows = [
        {
            "step": 10 * i,
            "examples": 2560 * i,
            "train/loss": 10 / (i + 1),
            "train/sigmoid_loss": 10 / (i + 1),
            "train/logit_scale": 10 + 0.1 * i,
            "train/logit_bias": -5.5,
            "train/lr": 1e-3 * i / num_rows,
            "train/grad_norm": 1 + i % 3,
            "perf/samples_per_second": 100.0,
            "perf/data_time_pct": 3.0,
            "time_s": 6.0 * i,
        }
        for i in range(num_rows)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run whose captions, subset and source names all attack the page."""
    folder = tmp_path_factory.mktemp("run")
    data = write_folder(folder / "data")
    for path in data.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["captions"]["en"] = f"{record['group']} {ATTACK}"
        if record["subset"] == "flat":
            record["subset"] = ATTACK
        path.write_text(json.dumps(record), encoding="utf-8")
    sources = {"held_out": open_source(str(data)), f"seen {ATTACK}": open_source(str(data))}
    model, transform = tiny_model(), FixedTransform(32)
    result = evaluate(model, sources, transform, tokenize, EvalConfig(classes="captions:en"))
    result.write_json(folder / "eval.json")
    collect_gallery(model, sources, transform, tokenize).save(folder / "gallery")
    write_metrics(folder)
    env = {"siglip2": "0.1.0", "torch": ATTACK, "threads": 2, "gpu": None}
    (folder / "env.json").write_text(json.dumps(env))
    (folder / "config.yaml").write_text(json.dumps({"model": {"name": ATTACK}, "data": {}}))
    return folder


@pytest.fixture(scope="module")
def report(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def test_fetches_nothing_and_runs_nothing(report):
    page = Page(report)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "xlink:href", "action"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:image/webp;base64,")), (tag, value)
    style = re.search(r"<style>(.*?)</style>", report, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_captions_are_text(report):
    assert "<script" not in report
    assert "alert(1)" in "".join(Page(report).words)


def test_pictures_and_charts_are_described(report):
    tags = Page(report).tags
    pictures = [a for tag, a in tags if tag == "img"]
    assert len(pictures) > 40
    assert all(a["alt"] for a in pictures)
    assert {a["alt"].split(":")[0] for a in pictures} >= {"right", "wrong"}
    charts = [a for tag, a in tags if tag == "svg"]
    assert len(charts) == 7
    assert all(a["role"] == "img" and "against step" in a["aria-label"] for a in charts)


def test_captions_carry_language_and_direction(report):
    asked = [a for tag, a in Page(report).tags if tag == "q"]
    assert {a["lang"] for a in asked} == {"en", *LANGUAGES}
    assert all(a["dir"] == "auto" for a in asked)


def test_sources_and_subsets_are_shown_apart(report):
    words = "".join(Page(report).words)
    for name in ("Held out - framed", "Held out - <script>", "Seen <script>"):
        assert name in words
    assert "Zero-shot classification into 6 classes" in words


def test_is_made_again_from_files_alone(run_dir, report):
    (run_dir / "report.html").unlink()
    assert write_report(str(run_dir)).read_text(encoding="utf-8") == report
    assert not list(run_dir.glob(".*.partial"))


def test_metrics_alone_are_enough(tmp_path):
    write_metrics(tmp_path)
    words = "".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).words)
    assert "Loss" in words
    assert "Retrieval" not in words
    assert "74,240" in words


def test_needs_metrics(tmp_path):
    with pytest.raises(DataError, match=r"need the run's metrics.jsonl to report on; none in"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no step yet"):
        write_report(tmp_path)


def test_a_torn_last_line_is_dropped_and_a_torn_middle_one_named(tmp_path):
    write_metrics(tmp_path, num_rows=5)
    path = tmp_path / "metrics.jsonl"
    whole = write_report(tmp_path).read_text(encoding="utf-8")
    path.write_text(path.read_text() + '{"step": 50, "train/lo')
    assert write_report(tmp_path).read_text(encoding="utf-8") == whole
    path.write_text(path.read_text() + '\n{"step": 60}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 6 is not JSON"):
        write_report(tmp_path)


def test_damaged_results_are_named(tmp_path):
    write_metrics(tmp_path)
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(DataError, match=r"eval.json is not JSON .*: run the evaluation again"):
        write_report(tmp_path)
    (tmp_path / "eval.json").unlink()
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gallery.json").write_text('[{"name": "x"}]')
    with pytest.raises(DataError, match=r"cannot read .*gallery.json"):
        write_report(tmp_path)


def test_losses_that_are_not_finite_are_counted(tmp_path):
    write_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "examples": 1, "train/loss": NaN, "time_s": 1}\n')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "1 logged losses are not finite" in text
    assert not any("nan" in points for points in re.findall(r'points="([^"]*)"', text))


def test_gallery_comes_back_from_its_files(tmp_path):
    source = open_source(str(write_folder(tmp_path / "data")))
    gallery = collect_gallery(tiny_model(), {"x": source}, FixedTransform(32), tokenize)
    gallery.save(tmp_path / "out")
    assert load_gallery(tmp_path / "out") == gallery
    gallery.save(tmp_path / "out")
    assert load_gallery(tmp_path / "out") == gallery
    assert load_gallery(tmp_path / "none") == Gallery([])


def test_gallery_marks_hits_by_group(tmp_path):
    source = open_source(str(write_folder(tmp_path / "data")))
    (found,) = collect_gallery(tiny_model(), {"x": source}, FixedTransform(32), tokenize).sources
    english = [query for query in found.by_caption if query["language"] == "en"]
    assert len(english) == 2
    for query in english:
        for hit in query["hits"]:
            assert hit["right"] == hit["key"].endswith(f"-{query['text']}.png")
    for card in found.by_image:
        names = card["languages"]["en"]
        assert [name["right"] for name in names] == [n["text"] == card["caption"] for n in names]


@pytest.mark.parametrize(
    ("texts", "script"),
    [
        (["a cat", "ein Haus"], "Latin"),
        (["кот"], "Cyrillic"),
        (["قطة"], "Arabic"),
        (["红色"], "Han"),
        (["犬", "いぬ"], "Japanese"),
        (["고양이"], "Hangul"),
        (["แมว"], "Thai"),
        (["बिल्ली"], "Devanagari"),
        (["123 !"], "Unknown"),
    ],
)
def test_script(texts, script):
    assert script_of(texts) == script


def test_languages_of_other_scripts_come_first():
    captions = [{"de": "Rot", "en": "red", "ru": "красный", "fr": "rouge", "ko": "빨강"}] * 3
    assert list(choose_languages(captions, limit=4)) == ["en", "ko", "ru", "de"]
    assert list(choose_languages([*captions, {"en": "x"}], limit=1)) == ["en"]
