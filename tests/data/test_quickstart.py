import json
import subprocess
import sys

import pytest

from siglip2.config import DataConfig, QuickstartConfig
from siglip2.data import quickstart
from siglip2.data.emoji_names import all_concepts, base_emoji, families, is_flag, split
from siglip2.data.images import decode_image
from siglip2.data.quickstart import quickstart_dir
from siglip2.data.sources import open_source
from siglip2.data.tokenizer import check_tokenizer, get_tokenizer
from siglip2.errors import ConfigError, DataError, MissingDependencyError

LANGUAGES = {"en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return DataConfig(quickstart=QuickstartConfig(concepts=40, cache_dir=str(cache)))


def examples(part, config):
    source = open_source(f"quickstart:{part}", config)
    return [source[i] for i in range(len(source))]


def named(*names):
    """English name -> emoji, for names of the real set."""
    by_name = {entry["en"]: emoji for emoji, entry in base_emoji().items()}
    return [by_name[name] for name in names]


def test_training_part_has_every_concept_in_both_styles_and_14_languages(config):
    found = examples("train", config)
    plain = [e for e in found if not e.key.endswith("-more")]
    assert len(plain) == 80
    assert all(set(e.captions) == LANGUAGES for e in plain)
    keys = {
        style: {e.key.partition("-")[2] for e in plain if e.subset == style}
        for style in ("twemoji", "openmoji")
    }
    assert keys["twemoji"] == keys["openmoji"]
    assert len(keys["twemoji"]) == 40
    assert all("_" not in text and ":" not in text for e in plain for text in e.captions.values())


def test_flags_come_a_second_time_under_their_names_in_other_languages(config):
    found = {e.key: e for e in examples("train", config)}
    more = [e for e in found.values() if e.key.endswith("-more")]
    assert more
    for e in more:
        twin = found[e.key.removesuffix("-more")]
        assert e.group == twin.group
        assert len(e.captions) > 150
        assert not set(e.captions) & LANGUAGES


def test_pictures_decode_and_styles_differ(config):
    pictures = {}
    for e in examples("heldout", config)[:40]:
        image = decode_image(e.image)
        assert image.size == (72, 72)
        assert len(image.getcolors(maxcolors=72 * 72)) > 1
        pictures.setdefault(e.group, set()).add(image.tobytes())
    assert all(len(drawings) == 2 for drawings in pictures.values())


def test_no_concept_and_no_family_is_on_both_sides(config):
    train = {e.group for e in examples("train", config)}
    held_out = {e.group for e in examples("heldout", config)}
    assert len(held_out) >= 100
    assert not train & held_out
    concepts = all_concepts({emoji: emoji.encode() for emoji in base_emoji()})
    kept, kept_out = split(concepts, train=None, held_out=191)
    assert 180 <= len(kept_out) <= 191
    assert not {c.family for c in kept} & {c.family for c in kept_out}
    assert len(kept) + len(kept_out) == len(concepts)


@pytest.mark.parametrize(
    "alike",
    [
        pytest.param(("astronaut", "man astronaut", "woman astronaut"), id="person"),
        pytest.param(("man walking", "woman walking facing right"), id="direction"),
        pytest.param(("red heart", "blue heart", "broken heart"), id="head-word"),
        pytest.param(("one o’clock", "five o’clock"), id="clocks"),
        pytest.param(("keycap 1", "keycap #"), id="keycaps"),
        pytest.param(("family man boy", "family woman woman girl"), id="families"),
    ],
)
def test_variants_are_one_family(alike):
    concepts = {
        c.names["en"]: c.family for c in all_concepts({e: e.encode() for e in base_emoji()})
    }
    assert len({concepts[name] for name in alike}) == 1


def test_flags_are_their_own_families_unless_drawn_alike():
    norway, svalbard, chad = named("Norway", "Svalbard & Jan Mayen", "Chad")
    pictures = {norway: b"cross", svalbard: b"cross", chad: b"stripes"}
    found = families({norway: "Norway", svalbard: "Svalbard", chad: "Chad"}, pictures)
    assert found[norway] == found[svalbard] != found[chad]
    groups = {c.emoji: c.group for c in all_concepts(pictures)}
    assert groups[norway] == groups[svalbard] != groups[chad]
    assert is_flag(norway)
    assert not is_flag(named("pirate flag")[0])


def test_folder_holds_tokenizer_licences_and_options(config):
    folder = quickstart_dir(config.quickstart)
    licences = (folder / "LICENSES.txt").read_text()
    assert all(
        name in licences for name in ("CC-BY 4.0", "CC-BY-SA 4.0", "BSD-3-Clause", "Unicode")
    )
    assert json.loads((folder / "meta.json").read_text())["examples"]["train"] >= 80
    source = open_source("quickstart:train", config)
    tokenizer = get_tokenizer(source.tokenizer_path, text_length=16)
    check_tokenizer(tokenizer, 16)
    caption = source[0].captions["en"]
    assert tokenizer.decode(tokenizer([caption])[0]) == caption.lower()


def test_it_is_built_once_and_announced_once(config, capfd, monkeypatch):
    folder = quickstart_dir(config.quickstart)
    monkeypatch.setattr(quickstart, "_build", None)
    assert quickstart_dir(config.quickstart) == folder
    assert capfd.readouterr().err == ""


def test_held_out_styles_and_languages_are_parts_of_their_own(tmp_path, capfd):
    options = QuickstartConfig(
        concepts=12,
        held_out_styles=("openmoji",),
        held_out_languages=("ko", "tr"),
        cache_dir=str(tmp_path),
    )
    config = DataConfig(quickstart=options)
    train, style, language = (examples(part, config) for part in ("train", "style", "language"))
    assert "licences" in capfd.readouterr().err
    assert {e.subset for e in train} == {"twemoji"}
    assert not any({"ko", "tr"} & set(e.captions) for e in train)
    assert {e.subset for e in style} == {"openmoji"}
    assert {e.group for e in style} == {e.group for e in language} == {e.group for e in train}
    assert all(set(e.captions) == {"ko", "tr"} for e in language)


def test_empty_parts_say_which_option_fills_them(config):
    with pytest.raises(DataError, match=r"'quickstart:style' is empty: set .*held_out_styles"):
        open_source("quickstart:style", config)
    with pytest.raises(DataError, match=r"parts are train, heldout, style, language; got .*:test'"):
        open_source("quickstart:test", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_styles": ("apple",)}, "held_out_styles must leave a style"),
        ({"held_out_styles": ("twemoji", "openmoji")}, "held_out_styles must leave a style"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction must be in \[0, 1\); got 1.0"),
        ({"concepts": 0}, "concepts must be positive; got 0"),
        ({"held_out_languages": ("tlh",)}, "held_out_languages must be some of .*; got tlh"),
    ],
    ids=str,
)
def test_wrong_options_are_named(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        quickstart_dir(QuickstartConfig(cache_dir=str(tmp_path), **options))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_PACKAGES", ("emoji", "no-such-package"))
    with pytest.raises(
        MissingDependencyError, match=r"'no-such-package': pip install 'siglip2\[qui"
    ):
        quickstart_dir(QuickstartConfig(cache_dir=str(tmp_path)))


def test_a_folder_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data.quickstart.cache_dir to a writable folder"):
        quickstart_dir(QuickstartConfig(cache_dir=str(tmp_path / "file")))


def test_cldr_folder_widens_the_captions(tmp_path):
    chosen = named("red heart", "rabbit", "umbrella", "axe", "taxi")
    for package, kind in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        for language, count in (("sw", 5), ("xx", 2)):  # xx names too few of them
            entries = {
                e.replace("\ufe0f", ""): {"tts": [f"{language} name"]} for e in chosen[:count]
            }
            folder = tmp_path / package / kind / language
            folder.mkdir(parents=True)
            content = {kind: {"annotations": entries}}
            (folder / "annotations.json").write_text(json.dumps(content), "utf-8")
    for concept in all_concepts({emoji: emoji.encode() for emoji in chosen}, str(tmp_path)):
        assert set(concept.names) == LANGUAGES | {"sw"}
        assert concept.names["sw"] == "sw name"


def test_an_empty_cldr_folder_is_refused(tmp_path):
    pictures = dict.fromkeys(named("rabbit"), b"")
    with pytest.raises(
        DataError, match="cldr_dir needs cldr-annotations-full/annotations/<language>"
    ):
        all_concepts(pictures, str(tmp_path))


_BUILD_AND_HANG = """
import sys, time
from siglip2.config import QuickstartConfig
from siglip2.data import quickstart

def hang(*args):
    print("writing", flush=True)
    time.sleep(60)

quickstart._write_part = hang
quickstart.quickstart_dir(QuickstartConfig(concepts=5, cache_dir=sys.argv[1]))
"""


def test_a_killed_build_leaves_nothing_that_counts_as_data(tmp_path, monkeypatch):
    command = [sys.executable, "-c", _BUILD_AND_HANG, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".building-") for path in left] == [True]

    monkeypatch.setattr(quickstart, "_STALE_S", -1.0)
    folder = quickstart_dir(QuickstartConfig(concepts=5, cache_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} >= {"train-0000.tar", "tokenizer.json"}


def test_a_builder_that_was_overtaken_uses_the_others_folder(tmp_path, monkeypatch):
    options = QuickstartConfig(concepts=5, cache_dir=str(tmp_path))
    real = quickstart._build

    def build(folder, config, versions):
        real(folder, config, versions)
        monkeypatch.setattr(quickstart, "_build", real)
        quickstart_dir(options)  # another process finishes first

    monkeypatch.setattr(quickstart, "_build", build)
    folder = quickstart_dir(options)
    assert list(tmp_path.iterdir()) == [folder]
