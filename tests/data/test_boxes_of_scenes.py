"""Boxes of composed scenes, whose true boxes are known, by a detector that is wrong about half."""

import re

import numpy as np
from data.made_files import picture

from siglip2.data.detect import BoxOptions
from siglip2.data.images import decode_image
from siglip2.data.region_shards import write_region_shards
from siglip2.data.scenes import _WORDS, Scenes
from siglip2.data.sources import IndexedSource, iterate, open_source
from siglip2.data.types import Example


class _Names(IndexedSource):
    """Eight drawings of noise, each with a name in every language of scenes."""

    def __init__(self):
        super().__init__("names")

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return Example(str(i), picture(i), {x: f"{x}{i}" for x in _WORDS}, group=f"g{i}")


class _Truth:
    """Knows scenes by their pixels: right about even concepts; a low score for wrong places of odd
    ones, and for what is not a name; a second, shifted box for right ones."""

    def __init__(self, scenes, count):
        examples = (scenes[i] for i in range(count))
        self.regions = {decode_image(x.image).tobytes(): x.regions for x in examples}

    def __call__(self, image, phrases):
        for region in self.regions[image.tobytes()]:
            box = [side * image.width for side in region.box]
            for index, phrase in enumerate(phrases):
                if phrase not in region.phrases.values():
                    continue
                if int(re.sub(r"\D", "", phrase)) % 2:
                    yield index, 0.29, (0, 0, 5, 5)
                else:
                    yield index, 0.5, (box[0] + 1, *box[1:])
                    yield index, 0.7, box


def test_scenes_keep_the_boxes_a_detector_is_sure_of(tmp_path):
    scenes = Scenes(_Names(), count=12, canvas_px=60)
    options = BoxOptions(languages=("en", "de"), most_words=3)
    report = write_region_shards(
        scenes, tmp_path, _Truth(scenes, 12), options, detector="truth", examples_per_shard=5
    )
    written = list(iterate(open_source(str(tmp_path / "boxes-*.tar"))))
    assert (len(written), report.shards) == (12, 3)
    kept = 0
    for example, scene in zip(written, map(scenes.__getitem__, range(12)), strict=True):
        assert (example.captions, example.image) == (dict(scene.captions), scene.image)
        assert example.group == scene.group
        true = {
            (language, region.phrases[language]): region.box
            for region in scene.regions
            for language in ("en", "de")
            if int(region.phrases[language][2:]) % 2 == 0
        }
        found = {(x, p): r.box for r in example.regions for x, p in r.phrases.items()}
        assert found.keys() == true.keys()
        for name in true:
            np.testing.assert_allclose(found[name], true[name])
        kept += len(true)
    assert report.counts.boxes == kept > 0
    assert report.counts.asked["dropped: overlap"] == kept
    assert report.counts.asked["dropped: low score"] > 0
