import csv
import gzip
import json
import tarfile

import pytest
from data.made_files import pair, picture, write_tar

from siglip2.config import DataConfig
from siglip2.data.captions import parse_captions
from siglip2.data.inspect import inspect
from siglip2.data.sources import IndexedSource, ShardSource, iterate, open_source
from siglip2.data.types import BadSampleError
from siglip2.errors import DataError


def read(source):
    return list(iterate(source))


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        write_tar(
            tmp_path / f"x-{shard:04d}.tar", {f"{shard}{i}": pair(10 * shard + i) for i in range(4)}
        )
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("x-{0000..0002}.tar", "00"),
        ("x-*.tar", "00"),
        ("x-0001.tar::x-0000.tar", "10"),
    ],
)
def test_tars_by_braces_globs_and_lists(shards, spec, first):
    spec = "::".join(str(shards / part) for part in spec.split("::"))
    source = open_source(spec)
    assert isinstance(source, IndexedSource)
    found = read(source)
    assert len(found) == 4 * len(source.shards)
    assert found[0].key == first
    assert found[0].captions == {"und": f"caption {int(first)}"}
    assert found[0].image == picture(int(first))
    assert found[0].group == first


def test_streamed_tars_give_what_indexed_ones_give(shards):
    spec = str(shards / "x-{0000..0002}.tar")
    streamed = open_source(spec, DataConfig(train_num_samples=5, resampled=True))
    assert isinstance(streamed, ShardSource)
    assert (streamed.train_num_samples, streamed.resampled) == (5, True)
    assert read(streamed) == read(open_source(spec))


def test_compressed_tars_are_streamed(shards):
    path = shards / "x-0000.tar.gz"
    path.write_bytes(gzip.compress((shards / "x-0000.tar").read_bytes()))
    source = open_source(str(path))
    assert isinstance(source, ShardSource)
    assert read(source) == read(open_source(str(shards / "x-0000.tar")))


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_tar_sidecars(tmp_path, streamed):
    record = {"captions": {"en": "a cat", "de": "eine Katze"}, "group": 7, "subset": "art"}
    samples = {
        "dir/a": {"jpg": picture(0, "JPEG"), "json": json.dumps(record)},
        "b": {
            "webp": picture(1, "WEBP"),
            "json": json.dumps({"caption": "hello", "language": "en"}),
        },
        "c": {"PNG": picture(2), "json": json.dumps({"width": 8}), "txt": "from text"},
        "d": {"png": picture(3)},
        "e": {"txt": "no picture"},
        "f": {"png": picture(4), "json": "{"},
    }
    write_tar(tmp_path / "a.tar", samples)
    config = DataConfig(train_num_samples=100 if streamed else None)
    a, b, c, d, e, f = read(open_source(str(tmp_path / "a.tar"), config))
    assert (a.key, a.group, a.subset) == ("dir/a", "7", "art")
    assert a.captions == {"en": "a cat", "de": "eine Katze"}
    assert b.captions == {"en": "hello"}
    assert c.captions == {"und": "from text"}
    assert [x.reason for x in (d, e, f)] == ["no caption", "no image", "unreadable caption file"]
    assert [x.key for x in (d, e, f)] == ["d", "e", "f"]


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_a_damaged_shard_gives_what_is_whole_and_says_so(shards, streamed):
    path = shards / "x-0001.tar"
    path.write_bytes(path.read_bytes()[:2800])
    config = DataConfig(train_num_samples=100 if streamed else None)
    found = read(open_source(str(shards / "x-*.tar"), config))
    bad = [item for item in found if isinstance(item, BadSampleError)]
    assert [item.reason for item in bad] == ["damaged shard"]
    assert "x-0001.tar" in bad[0].key
    assert 9 <= len(found) - len(bad) < 12


def test_a_shard_that_went_away_is_a_bad_example(shards):
    source = open_source(str(shards / "x-0000.tar"))
    (shards / "x-0000.tar").unlink()
    assert {item.reason for item in read(source)} == {"unreadable shard"}


def test_missing_shards_are_named(shards):
    with pytest.raises(DataError, match=r"no shard '.*x-0003.tar' .of '.*"):
        open_source(str(shards / "x-{0000..0003}.tar"))
    with pytest.raises(DataError, match=r"no shard '.*y-"):
        open_source(str(shards / "y-*.tar"))


def test_a_tar_without_images_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(DataError, match="holds no images"):
        open_source(str(tmp_path / "a.tar"))


def test_folder_takes_captions_from_beside_the_image_or_the_folder_name(tmp_path):
    for name in ("a.png", "b.png", "hot_dog/1.png", "hot_dog/2.png", "lost.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture())
    (tmp_path / "a.txt").write_text("  a caption\n")
    (tmp_path / "b.json").write_text(json.dumps({"captions": {"de": "Bild"}, "group": "g"}))
    a, b, one, two, lost = read(open_source(str(tmp_path)))
    assert (a.key, a.captions, a.group) == ("a.png", {"und": "a caption"}, "a.png")
    assert (b.captions, b.group) == ({"de": "Bild"}, "g")
    assert one.captions == two.captions == {"und": "hot dog"}
    assert one.group == two.group == "hot_dog"
    assert (lost.reason, lost.key) == ("no caption", "lost.png")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(\.bmp, .*\.webp\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables(tmp_path, suffix):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(picture())
    rows = [
        {"image": "img/a.png", "caption": "plain, text"},
        {"image": "img/a.png", "caption": json.dumps({"en": "a cat", "fr": "un chat"})},
        {"image": "img/none.png", "caption": "lost"},
        {"image": "img/a.png", "caption": ""},
        {"image": "", "caption": "nothing"},
    ]
    path = tmp_path / f"data{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        if suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.write("{broken\n")
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    plain, dictionary, *bad = read(open_source(str(path)))
    assert plain.captions == {"und": "plain, text"}
    assert dictionary.captions == {"en": "a cat", "fr": "un chat"}
    assert plain.group == dictionary.group == "img/a.png"  # one picture
    assert plain.key != dictionary.key
    reasons = ["missing image file", "no caption", "no image"]
    assert [x.reason for x in bad] == reasons + ["malformed row"] * (suffix == ".jsonl")


def test_table_with_a_column_for_each_language(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    path = tmp_path / "data.csv"
    path.write_text(
        "image,caption_en,caption_zh_Hant,subset\na.png,a cat,貓,s\na.png,,貓,s\n", "utf-8"
    )
    first, second = read(open_source(str(path)))
    assert first.captions == {"en": "a cat", "zh-Hant": "貓"}
    assert second.captions == {"zh-Hant": "貓"}
    assert first.subset == "s"


def test_wrong_columns_are_named(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("file,text_en\na.png,a cat\n")
    message = (
        r"needs the columns 'image' and 'caption' .*; it has file, text_en\. Set data.image_column"
    )
    with pytest.raises(DataError, match=message):
        open_source(str(path))
    (tmp_path / "a.png").write_bytes(picture())
    config = DataConfig(image_column="file", caption_column="text_en")
    assert read(open_source(str(path), config))[0].captions == {"und": "a cat"}


def test_hf_data_sets_from_disk_and_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [{"bytes": picture(i), "path": None} for i in range(3)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {"image": images, "caption": ["zero", "one", ""]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    specs = (
        f"hf:{tmp_path / 'single'}",
        f"hf:{tmp_path / 'splits'}",
        f"hf:{tmp_path / 'parquet'}",
        str(tmp_path / "parquet" / "train.parquet"),
    )
    for spec in specs:
        zero, one, empty = read(open_source(spec))
        assert (zero.captions, zero.image) == ({"und": "zero"}, picture(0))
        assert one.image == picture(1)
        assert empty.reason == "no caption"
    test = read(open_source(f"hf:{tmp_path / 'splits'}:test"))
    assert [x.captions["und"] for x in test] == ["one"]
    with pytest.raises(DataError, match="has no split 'val'; it has train, test"):
        open_source(f"hf:{tmp_path / 'splits'}:val")
    with pytest.raises(DataError, match="is a single split; drop ':val'"):
        open_source(f"hf:{tmp_path / 'single'}:val")
    with pytest.raises(
        DataError, match=r"needs the columns 'picture' and 'caption' .* it has image"
    ):
        open_source(specs[0], DataConfig(image_column="picture"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="datasets cannot load"):
        open_source(f"hf:{tmp_path / 'empty'}")


def test_unknown_specs_say_what_is_accepted(tmp_path):
    with pytest.raises(
        DataError, match="no data at '/nowhere': need 'quickstart:train', 'scenes:train', tars"
    ):
        open_source("/nowhere")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"cannot tell what '.*x.txt' is: need"):
        open_source(str(tmp_path / "x.txt"))


def test_captions_of_every_form():
    assert parse_captions(" a ") == {"und": "a"}
    assert parse_captions("{not json}") == {"und": "{not json}"}
    assert parse_captions(["a", "", "b"], "en") == {"en": "a", "en-x-1": "b"}
    assert parse_captions({"en": ["a", "b"], "de": ""}) == {"en": "a", "en-x-1": "b"}
    assert parse_captions(None) == parse_captions(3) == parse_captions("  ") == {}


def test_inspect_counts_what_is_there_and_what_is_wrong(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i) if i else b"broken")
        (tmp_path / f"{i}.json").write_text(
            json.dumps({"captions": {"en": "x" * (i + 1), "de": "y"}})
        )
    found = inspect(str(tmp_path))
    assert (found.total, found.good, found.groups) == (3, 2, 2)
    assert found.languages == {"en": 2, "de": 2}
    assert found.caption_chars == (1, 2, 3)  # y y xx xxx
    assert found.image_px == ((8, 8), (8, 8), (8, 8))
    assert found.bad == {"cannot decode image": 1}
    assert "2 good of 3 read of 3" in str(found)
    assert "cannot decode image 1" in str(found)
    assert inspect(str(tmp_path), limit=2).good == 1
