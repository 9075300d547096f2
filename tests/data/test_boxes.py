"""`siglip2 data boxes`: what a detector says ends up in tars as it should, or not at all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data.made_detectors import colours, paint
from data.made_files import picture
from PIL import Image

from siglip2.cli import main
from siglip2.config import DataConfig
from siglip2.data.detect import BoxOptions
from siglip2.data.images import decode_image
from siglip2.data.region_shards import write_region_shards
from siglip2.data.sources import iterate, open_source
from siglip2.errors import ConfigError

TESTS = Path(__file__).parents[1]
COLOURS = "data.made_detectors:colours"


@pytest.fixture
def painted(tmp_path):
    """Seven images: 0 has three rectangles, 3 cannot be decoded, 5 has none, the others one."""
    folder = tmp_path / "painted"
    folder.mkdir()
    boxes = {"red": (0, 0, 10, 10), "green": (20, 5, 40, 15), "blue": (5, 12, 25, 30)}
    for i in range(7):
        shown = boxes if i == 0 else {} if i == 5 else {"red": (i, 0, i + 9, 20)}
        paint(folder / f"{i}.png", **shown)
        (folder / f"{i}.txt").write_text("a red square, green and the blue Box of nothing")
    (folder / "3.png").write_bytes(b"broken")
    return folder


def read(folder):
    return list(iterate(open_source(str(folder / "boxes-*.tar"))))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_boxes_are_written_as_they_were_found(painted, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["data", "boxes", str(painted), str(out), "--detector", COLOURS]
    assert main([*argv, "--examples-per-shard", "4", "--overlap", "0.6"]) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(
        rf"{out}: images 6 \(1 without boxes\), boxes 7 of \d+ found, skipped cannot decode"
        r" image 1, shards 2; counts in boxes.json\n",
        line,
    )
    zero, *others = read(out)
    assert zero.captions == {"und": "a red square, green and the blue Box of nothing"}
    assert zero.image == (painted / "0.png").read_bytes()
    found = [(region.phrases, [round(s, 4) for s in region.box]) for region in zero.regions]
    assert found == [
        ({"und": "red"}, [0.0, 0.0, 0.25, 0.3333]),
        ({"und": "green"}, [0.5, 0.1667, 1.0, 0.5]),  # cut at the edge
        ({"und": "blue"}, [0.125, 0.4, 0.625, 1.0]),  # once
    ]
    assert [len(example.regions) for example in others] == [1, 1, 1, 0, 1]
    assert len({example.key for example in (zero, *others)}) == 6
    counts = json.loads((out / "boxes.json").read_text())
    assert (counts["examples"], counts["without_boxes"], counts["boxes"]) == (6, 1, 7)
    assert counts["skipped"] == {"cannot decode image": 1}
    assert counts["phrases"] == {"red": 5, "green": 1, "blue": 1}
    assert counts["asked"]["dropped: overlap"] == 1
    found = counts["asked"]["boxes found"]
    assert found == 7 + 1 + counts["asked"]["dropped: low score"]
    assert not list(out.glob(".*"))


def test_a_killed_run_goes_on_at_its_shard(painted, tmp_path, monkeypatch, capsys):
    """kill -9 in the second shard of three: the first stays as it is, the rest is as ever."""
    whole, out, left = tmp_path / "whole", tmp_path / "out", tmp_path / "left"
    monkeypatch.setenv("PICTURES_LEFT", str(left))
    options = ["--examples-per-shard", "3", "--detector", "data.made_detectors:killed"]
    argv = lambda folder: ["data", "boxes", str(painted), str(folder), *options]
    left.write_text("4")
    command = [sys.executable, "-m", "siglip2", *argv(out)]
    assert subprocess.run(command, cwd=TESTS, capture_output=True).returncode == -9
    assert [path.name for path in out.glob("*.tar")] == ["boxes-000000.tar"]
    assert (out / ".boxes-000001.tar.partial").is_file()
    first = (out / "boxes-000000.tar").stat()
    left.write_text("99")
    assert main(argv(out)) == 0
    assert "shards 3 (1 made before)" in capsys.readouterr().out
    assert left.read_text() == "96"  # the three images of the first shard were not looked at again
    assert (out / "boxes-000000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert main(argv(whole)) == 0
    assert contents(out) == contents(whole)
    assert main(argv(out)) == 0
    assert "shards 3 (3 made before)" in capsys.readouterr().out
    assert contents(out) == contents(whole)


def test_parts_share_the_shards(painted, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv = ["--detector", COLOURS, "--examples-per-shard", "2"]
    assert main(["data", "boxes", str(painted), str(whole), *argv]) == 0
    for part in ("1/3", "0/3"):
        assert main(["data", "boxes", str(painted), str(out), *argv, "--part", part]) == 0
    assert sorted(path.stem[-1] for path in out.glob("*.tar")) == ["0", "1", "3"]
    assert main(["data", "boxes", str(painted), str(out), *argv, "--part", "2/3"]) == 0
    assert contents(out) == contents(whole)


def test_streamed_sources_give_the_same(painted, tmp_path):
    options = BoxOptions()
    write_region_shards(open_source(str(painted)), tmp_path / "a", colours, options, detector="c")
    tars = str(tmp_path / "a" / "boxes-*.tar")
    found = []
    for name, config in (("indexed", None), ("streamed", DataConfig(train_num_samples=9))):
        for part in ((1, 2), (0, 2)):
            write_region_shards(
                open_source(tars, config),
                tmp_path / name,
                colours,
                options,
                detector="c",
                examples_per_shard=4,
                part=part,
            )
        found.append([(x.key, x.regions) for x in read(tmp_path / name)])
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_other_options_do_not_go_on_with_a_folder(painted, tmp_path, capsys):
    argv = ["data", "boxes", str(painted), str(tmp_path / "out"), "--detector", COLOURS]
    assert main(argv) == 0
    assert main([*argv, "--threshold", "0.5", "--max-words", "2"]) == 1
    error = capsys.readouterr().err
    assert "holds boxes made otherwise: most_words 10 -> 2; threshold 0.3 -> 0.5" in error
    assert len(error.strip().splitlines()) == 1
    other = tmp_path / "other"
    painted.rename(other)
    assert main([*argv[:2], str(other), *argv[3:]]) == 1
    assert f"holds boxes made otherwise: source {painted} -> {other}" in capsys.readouterr().err
    other.rename(painted)
    (tmp_path / "out" / "boxes.json").unlink()
    assert main(argv) == 1
    assert "holds tars but no boxes.json: name another folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*argv[:3], str(tmp_path / "file"), *argv[4:]]) == 1
    assert "need a folder to write to" in capsys.readouterr().err


def test_categories_are_asked_of_every_image(painted, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("# mine\nred\n\nblue\nred\n")
    argv = ["data", "boxes", str(painted), str(tmp_path / "out"), "--detector", COLOURS]
    options = ["--categories", str(tmp_path / "words.txt"), "--max-words", "0"]
    assert main([*argv, *options]) == 0
    assert {p for x in read(tmp_path / "out") for r in x.regions for p in r.phrases.values()} == {
        "red",
        "blue",
    }
    (tmp_path / "words.txt").write_text("# nothing\n")
    assert main([*argv, *options]) == 1
    assert "need a text file with a category a line" in capsys.readouterr().err


def test_a_detector_of_the_current_folder_leaves_the_path_as_it_was(
    painted, tmp_path, monkeypatch, capsys
):
    (tmp_path / "my_detector_here.py").write_text("def detect(image, phrases):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    argv = ["data", "boxes", "painted", "out", "--detector", "my_detector_here:detect"]
    assert main(argv) == 0
    assert "images 6 (6 without boxes), boxes 0 of 0 found" in capsys.readouterr().out
    assert sys.path == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--detector", "nothing"],
            "--detector: need the folder of an OWLv2 model, or MOD",
        ),
        (["--detector", "no.such:thing"], "No module named 'no'"),
        (["--detector", "data.made_detectors:nothing"], "'data.made_detectors' has no 'nothing'"),
        (["--detector", "data.made_detectors:os"], "cannot be called"),
        (["--detector", COLOURS, "--prompt", "a {}"], "--prompt and --device are of OWLv2"),
        (["--detector", COLOURS, "--part", "1"], "--part: need i/n, such as 0/8; got '1'"),
        (["--detector", COLOURS, "--part", "2/2"], "a part i/n with 0 <= i < n; got 1000 and 2/2"),
        (
            ["--detector", COLOURS, "--threshold", "3"],
            "need a threshold and an overlap from 0 to 1",
        ),
        (["--detector", COLOURS, "--max-boxes", "0"], "need at least 1 box a picture"),
        (["--detector", COLOURS, "--max-words", "0"], "need categories where n-grams have 0 words"),
        (["--detector", COLOURS, "--categories", "/no"], "need a text file with a category a line"),
        (
            ["--detector", "data.made_detectors:wrong_index"],
            "need a detector's (phrase index below",
        ),
    ],
)
def test_mistakes_are_one_line(painted, tmp_path, capsys, options, message):
    assert main(["data", "boxes", str(painted), str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not [*tmp_path.glob("out/*.tar"), *tmp_path.glob("out/.*")]


def test_pictures_that_tars_have_no_name_for_become_png(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    paint(folder / "a.tiff", red=(0, 0, 9, 9))
    (folder / "b.jpg").write_bytes(picture(0, "JPEG"))
    for name in "ab":
        (folder / f"{name}.txt").write_text("red")
    out = tmp_path / "out"
    write_region_shards(open_source(str(folder)), out, colours, BoxOptions(), detector="c")
    a, b = read(out)
    assert Image.open(folder / "a.tiff").tobytes() == decode_image(a.image).tobytes()
    assert b.image == picture(0, "JPEG")
    with pytest.raises(ConfigError, match="need at least 1 example a shard"):
        write_region_shards(
            open_source(str(folder)),
            out,
            colours,
            BoxOptions(),
            detector="c",
            examples_per_shard=0,
        )
