"""Scenes of drawings: what is said of them is what is on them."""

import pickle

import numpy as np
import pytest
import torch
from data.made_files import picture

from siglip2.config import DataConfig, QuickstartConfig
from siglip2.data.images import FixedTransform, decode_image
from siglip2.data.loader import TrainLoader
from siglip2.data.regions import Region, box_from_pixels, cropped
from siglip2.data.scenes import _WORDS, CANVAS, MAX_COORDINATE, TASK_WORDS, Scenes, caption
from siglip2.data.sources import IndexedSource, open_source
from siglip2.data.tokenizer import get_tokenizer
from siglip2.data.types import Example
from siglip2.errors import DataError
from siglip2.locca import tasks


class Squares(IndexedSource):
    """Pictures of noise in eight concepts, each with a name in every language."""

    def __init__(self, count=8, languages=tuple(_WORDS)):
        super().__init__("squares")
        self.count, self.languages = count, languages

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        names = {language: f"{language}{i}" for language in self.languages}
        return Example(str(i), picture(i), names, group=f"g{i}")


def test_pictures_are_where_their_boxes_say():
    scenes = Scenes(Squares(), most=3, canvas_px=60)
    for index in range(20):
        scene = scenes.scene(index)
        covered = np.zeros((60, 60), dtype=bool)
        for region in scene.regions:
            x0, y0, x1, y1 = (round(60 * c) for c in region.box)
            assert not covered[y0:y1, x0:x1].any()  # apart
            covered[y0:y1, x0:x1] = True
            assert 0.19 * 60 <= x1 - x0 == y1 - y0 <= 0.5 * 60
        assert (scene.pixels[~covered] == CANVAS).all()
        assert (scene.pixels[covered] != CANVAS).mean() > 0.9


def test_captions_name_every_picture_and_its_place():
    def at(x, y):
        return Region(dict.fromkeys(_WORDS, "dog"), (x - 0.1, y - 0.1, x + 0.1, y + 0.1))

    assert caption((at(0.2, 0.2), at(0.5, 0.5), at(0.8, 0.5)), "en") == (
        "dog left top, dog middle, dog right"
    )
    assert caption((at(0.5, 0.9),), "de") == "dog unten"
    example = Scenes(Squares(), languages=_WORDS)[3]
    assert set(example.captions) == set(_WORDS)
    for region in example.regions:
        assert region.phrases["tr"] in example.captions["tr"]
    places = [region.box for region in example.regions]
    assert places == sorted(places)


def test_scenes_are_functions_of_their_number():
    first, again, other = Scenes(Squares()), Scenes(Squares()), Scenes(Squares(), held_out=True)
    assert first[5] == again[5]
    assert first[5].image != first[6].image
    assert first[5].image != other[5].image
    assert Scenes(Squares(), seed=1)[5].image != first[5].image
    sent = pickle.loads(pickle.dumps(first))  # to a reader process that is not forked
    assert sent[7] == first[7]


def test_the_vocabulary_holds_what_decoders_are_asked():
    assert {word.lower() for word in tasks.PREFIXES.values()} == set(TASK_WORDS)
    assert tasks.MAX_COORDINATE == MAX_COORDINATE


def test_too_few_concepts_are_an_error():
    with pytest.raises(DataError, match=r"need at least 3 concepts .* has 2 with names in de, en"):
        Scenes(Squares(2))
    with pytest.raises(DataError, match="has 0 with names"):
        Scenes(Squares(8, languages=("en", "de")), languages=("en", "fr"))


def test_the_default_scenes_train_a_loader(tmp_path):
    config = DataConfig(quickstart=QuickstartConfig(concepts=60, cache_dir=str(tmp_path)))
    train, held_out = (open_source(f"scenes:{part}", config) for part in ("train", "heldout"))
    assert (len(train), len(held_out)) == (1_000_000, 1_000)
    assert len({g for i in range(300) for g in train.scene(i).groups}) == 48
    tokenizer = lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64)
    batch = next(TrainLoader(train, FixedTransform(32), tokenizer, batch_size=4))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert decode_image(held_out[0].image).size == (96, 96)
    words = get_tokenizer(train.tokenizer_path, text_length=32)
    numbers = [" ".join(map(str, four)) for four in ((0, 7, 16, 32), (500, 31, 250, 499))]
    assert [len(ids) for ids in words.encode(numbers)] == [5, 5]  # one token each, and the end
    longest = max(
        len(ids) for i in range(50) for ids in words.encode([*train[i].captions.values()])
    )
    assert longest <= 32
    with pytest.raises(DataError, match="'scenes:train' or 'scenes:heldout'; got 'scenes:x'"):
        open_source("scenes:x", config)


@pytest.mark.parametrize(
    "box", [[0, 0, 5, 0], [3, 0, 2, 5], [-1, 0, 5, 5], [0, 0, 11, 5], [0, 0, 5]], ids=str
)
def test_rejects_what_is_no_box(box):
    with pytest.raises(DataError, match=r"photo.jpg, region 2: need"):
        box_from_pixels(box, height=20, width=10, where="photo.jpg, region 2")


def test_pixels_become_shares():
    assert box_from_pixels([2, 5, 10, 20], height=20, width=10, where="") == (0.2, 0.25, 1.0, 1.0)
    with pytest.raises(DataError, match="four finite numbers"):
        box_from_pixels([0, 0, float("nan"), 5], height=20, width=10, where="")


def test_a_crop_moves_cuts_and_drops_boxes():
    region = Region({"en": "dog"}, (0.2, 0.2, 0.6, 0.6))
    assert cropped(region, (0.0, 0.0, 1.0, 1.0)) == region
    half = cropped(region, (0.4, 0.0, 0.9, 1.0))
    np.testing.assert_allclose(half.box, (0.0, 0.2, 0.4, 0.6))
    assert cropped(region, (0.45, 0.0, 0.9, 1.0)) is None  # less than half is left
    assert cropped(region, (0.7, 0.7, 1.0, 1.0), min_kept=0.0) is None
