"""Regions in tables, tars and sidecars: pixels on disk, shares in examples."""

import csv
import json

import pytest
from data.made_files import picture, write_tar

from siglip2.config import DataConfig
from siglip2.data.regions import Region
from siglip2.data.sources import iterate, open_source
from siglip2.errors import DataError

BOXES = [[0, 0, 4, 8], [2.5, 1, 8, 7.5]]
SHARES = [(0.0, 0.0, 0.5, 1.0), (0.3125, 0.125, 1.0, 0.9375)]
REGIONS = [
    {"phrase": "a dog", "box": BOXES[0]},
    {"phrase": {"en": "a tree", "de": "ein Baum"}, "box": BOXES[1], "score": 0.5},
]
READ = (
    Region({"en": "a dog"}, SHARES[0]),
    Region({"en": "a tree", "de": "ein Baum"}, SHARES[1]),
)


def read(source, config=None):
    return list(iterate(open_source(str(source), config)))


def table(folder, *records):
    (folder / "a.png").write_bytes(picture())
    path = folder / "data.jsonl"
    rows = ({"image": "a.png", "caption": {"en": "a park"}, **record} for record in records)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_round_trip(tmp_path):
    path = table(
        tmp_path,
        {"regions": REGIONS},
        {"regions": REGIONS, "height": 16, "width": 80},  # said, and believed
        {"regions": [], "caption": "nothing marked"},
        {"regions": None},
        {"caption": {"en": "a park", "de": "ein Park"}, "regions": REGIONS[:1]},
    )
    marked, larger, *plain, both = read(path)
    assert marked.regions == READ
    assert larger.regions[0].box == (0.0, 0.0, 0.05, 0.5)
    assert [example.regions for example in plain] == [(), ()]
    assert both.regions[0].phrases == {"und": "a dog"}  # of one of two languages


def test_csv_has_them_as_json(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "language", "regions"])
        writer.writerow(["a.png", "a park", "en", json.dumps(REGIONS)])
        writer.writerow(["a.png", "a park", "en", ""])
        writer.writerow(["a.png", "a park", "en", "dog 0 0 4 8"])
    marked, plain, bad = read(tmp_path / "data.csv")
    assert (marked.regions, plain.regions) == (READ, ())
    assert str(bad) == "malformed regions: a.png#2"


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_tars_and_sidecars(tmp_path, streamed):
    record = json.dumps({"captions": {"en": "a park"}, "regions": REGIONS})
    bad = json.dumps({"caption": "x", "regions": [{"phrase": "dog", "box": [4, 0, 2, 8]}]})
    write_tar(
        tmp_path / "a.tar",
        {"a": {"png": picture(), "json": record}, "b": {"png": picture(), "json": bad}},
    )
    config = DataConfig(train_num_samples=9 if streamed else None)
    good, refused = read(tmp_path / "a.tar", config)
    assert good.regions == READ
    assert str(refused).startswith("bad box: b, region 0: need x0 < x1 within 0 to 8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "a.json").write_text(record)
    assert read(folder)[0].regions == READ


def test_hf_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    row = {"image": {"bytes": picture(), "path": None}, "caption": "a park", "language": "en"}
    rows = datasets.Dataset.from_list([{**row, "regions": REGIONS[:1]}, {**row, "regions": []}])
    rows.save_to_disk(tmp_path / "rows")
    marked, plain = read(f"hf:{tmp_path / 'rows'}")
    assert (marked.regions, plain.regions) == (READ[:1], ())


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([*REGIONS, {"phrase": "x", "box": [0, 0, 8.5, 4]}], "bad box: a.png#0, region 2: need x0"),
        ([{"phrase": "x", "box": [4, 0, 2, 4]}], "bad box: a.png#0, region 0: need x0 < x1"),
        ([{"phrase": "x", "box": [0, 0, float("nan"), 4]}], "region 0: need a box of four finite"),
        ([{"phrase": "x", "box": [0, 0, 4]}], "region 0: need a box of four finite"),
        ([{"phrase": "x", "box": [0, 0, True, 4]}], "region 0: need a box of four finite"),
        ([{"phrase": "x"}], "region 0: need a box of four finite numbers; got None"),
        ([REGIONS[0], {"box": BOXES[0]}], "region without a phrase: a.png#0, region 1"),
        ([{"phrase": "  ", "box": BOXES[0]}], "region without a phrase: a.png#0, region 0"),
        ({"phrase": "x", "box": BOXES[0]}, "malformed regions: a.png#0: need a list of {'phrase"),
        (["dog"], "malformed regions: a.png#0: need a list"),
    ],
)
def test_a_bad_region_is_refused_by_its_index(tmp_path, regions, message):
    bad, good = read(table(tmp_path, {"regions": regions}, {"regions": REGIONS}))
    assert isinstance(bad, DataError)
    assert message in str(bad)
    assert good.regions == READ


def test_a_broken_picture_is_said_to_be_that(tmp_path):
    path = table(tmp_path, {"regions": REGIONS}, {"regions": REGIONS, "image": "b.png"})
    (tmp_path / "b.png").write_bytes(b"broken")
    assert str(read(path)[1]) == "cannot decode image: b.png#1"
