"""COCO-style files: boxes and captions come out as they were written, or are refused by name."""

import json
import logging

import pytest
from data.made_examples import TOKENIZER
from data.made_files import picture
from data.made_regions import boxed, image, said, write_coco, write_pictures

from siglip2.data.images import FixedTransform
from siglip2.data.inspect import inspect
from siglip2.data.loader import TrainLoader
from siglip2.data.regions import Region, cropped
from siglip2.data.sources import iterate, open_source
from siglip2.data.types import BadSampleError
from siglip2.errors import DataError


def read(spec):
    return list(iterate(open_source(str(spec))))


def test_boxes_and_captions_are_joined_by_image_id(tmp_path):
    """In COCO's own folders: annotations/ beside val2017/."""
    write_pictures(tmp_path / "val2017", range(3))
    boxes = write_coco(
        tmp_path / "annotations" / "instances_val2017.json",
        [image(0), image(1), image(2)],
        [boxed(1, [4, 2, 4, 6], 7), boxed(0, [0, 0, 2, 4]), boxed(1, [0, 1, 2.5, 2])],
    )
    texts = write_coco(
        tmp_path / "annotations" / "captions_val2017.json",
        [image(1), image(0)],
        [said(1, "a light"), said(0, " a dog "), said(1, "eine Ampel", language="de"), said(1, "")],
        [],
    )
    zero, one, two = read(f"coco:{boxes},{texts}")
    assert (zero.key, zero.image, zero.group) == ("0.png#0", picture(0), "0.png")
    assert zero.captions == {"und": "a dog"}
    assert zero.regions == (Region({"und": "dog"}, (0.0, 0.0, 0.25, 0.5)),)
    assert one.captions == {"und": "a light", "de": "eine Ampel"}
    assert one.regions == (
        Region({"und": "traffic light"}, (0.5, 0.25, 1.0, 1.0)),
        Region({"und": "dog"}, (0.0, 0.125, 0.3125, 0.375)),
    )
    assert (two.reason, two.key) == ("no caption", "2.png#2")
    assert read(f"coco:{texts},{boxes}")[:2] == [one, zero]
    assert read(f"coco:{boxes},{texts}:{tmp_path / 'val2017'}")[:2] == [zero, one]


def test_images_without_any_captions_are_called_what_they_show(tmp_path):
    write_pictures(tmp_path, range(2))
    annotations = [boxed(0, [4, 0, 2, 2]), boxed(0, [0, 0, 2, 2], 7), boxed(0, [2, 0, 2, 2])]
    path = write_coco(tmp_path / "_annotations.coco.json", [image(0), image(1)], annotations)
    shown, empty = read(path)  # a .json needs no 'coco:'
    assert shown.captions == {"und": "traffic light, dog"}
    assert len(shown.regions) == 3
    assert empty.reason == "no caption"


def test_captions_alone_and_phrases_with_boxes(tmp_path):
    write_pictures(tmp_path, range(2))
    annotations = [
        said(0, "a park"),
        said(0, "red ball", bbox=[0, 0, 4, 4]),
        said(0, "roter Ball", bbox=[0, 0, 4, 4], language="de"),
        said(1, "a street"),
    ]
    path = write_coco(tmp_path / "a.json", [image(0), image(1)], annotations)
    park, street = read(path)
    assert park.captions == {"und": "a park"}
    box = (0.0, 0.0, 0.5, 0.5)
    assert park.regions == (Region({"und": "red ball"}, box), Region({"de": "roter Ball"}, box))
    assert (street.captions, street.regions) == ({"und": "a street"}, ())


def test_crowds_are_no_regions_and_strays_are_left_out_with_a_note(tmp_path, caplog):
    write_pictures(tmp_path, [0])
    annotations = [
        boxed(0, [0, 0, 8, 8], iscrowd=1, id=5),
        boxed(0, [0, 0, 4, 4], iscrowd=0, id=5),  # ids of annotations may repeat
        boxed(9, [0, 0, 4, 4]),
        said(0, "a dog"),
    ]
    path = write_coco(tmp_path / "a.json", [image(0)], annotations)
    with caplog.at_level(logging.WARNING, "siglip2"):
        [found] = read(path)
    assert [region.box for region in found.regions] == [(0.0, 0.0, 0.5, 0.5)]
    assert "1 annotations of images that are not listed" in caplog.text


@pytest.mark.parametrize(
    ("bbox", "said_of_it"),
    [
        ([6, 0, 4, 4], r"need x0 < x1 within 0 to 8 and y0 < y1 within 0 to 8; got \[6, 0, 10, 4"),
        ([4, 4, -2, 2], r"need x0 < x1 within 0 to 8"),
        ([4, 4, 0, 2], r"need x0 < x1 within 0 to 8"),
        ([0, 0, float("nan"), 2], "need a box of four finite numbers; got .*nan"),
        ([0, 0, 2], r"need a box of four finite numbers; got \[0, 0, 2\]"),
        ("0 0 2 2", "need a box of four finite numbers; got '?0 0 2 2"),
        ([0, 0, "2", 2], r"need a box of four finite numbers; got \[0, 0, '2', 2\]"),
    ],
    ids=["outside", "inverted", "empty", "nan", "three", "text", "text inside"],
)
def test_a_bad_box_is_refused_by_its_index(tmp_path, bbox, said_of_it):
    write_pictures(tmp_path, range(2))
    annotations = [boxed(0, [0, 0, 2, 2]), boxed(0, bbox), boxed(1, [0, 0, 2, 2])]
    path = write_coco(tmp_path / "a.json", [image(0), image(1)], annotations)
    bad, good = read(path)
    assert isinstance(bad, BadSampleError)
    assert bad.reason == "bad box"
    with pytest.raises(BadSampleError, match=f"^bad box: 0.png#0, region 1: {said_of_it}"):
        raise bad
    assert good.key == "1.png#1"


def test_a_box_that_was_rounded_over_the_edge_is_cut_there(tmp_path):
    write_pictures(tmp_path, [0])
    path = write_coco(tmp_path / "a.json", [image(0)], [boxed(0, [-0.5, 4, 9, 4.25])])
    assert read(path)[0].regions[0].box == (0.0, 0.5, 1.0, 1.0)


def test_sizes_come_from_the_header_where_the_file_says_none(tmp_path):
    write_pictures(tmp_path, range(2))
    (tmp_path / "1.png").write_bytes(b"broken")
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
    path = write_coco(tmp_path / "a.json", images, [boxed(i, [0, 0, 4, 2]) for i in range(2)])
    found, broken = read(path)
    assert found.regions[0].box == (0.0, 0.0, 0.5, 0.25)
    assert (broken.reason, broken.key) == ("cannot decode image", "1.png#1")


def test_missing_images_and_unknown_categories_are_skipped_and_counted(tmp_path):
    write_pictures(tmp_path, [0, 1, 2])
    annotations = [boxed(i, [0, 0, 4, 4], 99 if i == 1 else 1) for i in (0, 1, 3)]
    annotations += [boxed(2, [0, 0, 9.5, 4]), boxed(0, [0, 0, 8, 8])]
    path = write_coco(tmp_path / "a.json", [image(i) for i in range(4)], annotations)
    _, unknown, _, missing = read(path)
    assert str(unknown) == "unknown category: 1.png#1, region 0: category_id 99"
    assert str(missing) == "missing image file: 3.png#3"
    found = inspect(str(path))
    assert found.bad == {"unknown category": 1, "bad box": 1, "missing image file": 1}
    assert found.regions == (2, 1)
    assert "regions    2 on 1 images" in str(found)
    loader = TrainLoader(open_source(str(path)), FixedTransform(8), TOKENIZER, batch_size=2)
    next(loader)
    assert {"unknown category", "bad box", "missing image file"} >= set(loader.report()) != set()


def test_lvis_names_images_by_their_address(tmp_path):
    write_pictures(tmp_path / "train2017", [0])
    url = "http://images.cocodataset.org/train2017/0.png"
    entry = {"id": 0, "coco_url": url, "height": 8, "width": 8}
    path = write_coco(tmp_path / "lvis_v1_val.json", [entry], [boxed(0, [0, 0, 8, 8])])
    assert read(path)[0].image == picture(0)


def test_regions_of_a_crop(tmp_path):
    write_pictures(tmp_path, [0])
    path = write_coco(tmp_path / "a.json", [image(0)], [boxed(0, [2, 2, 4, 4])])
    [region] = read(path)[0].regions
    assert cropped(region, (0.5, 0.0, 1.0, 1.0)).box == (0.0, 0.25, 0.5, 0.75)  # pixels 4 to 8


def test_what_is_no_coco_is_refused_at_once(tmp_path):
    write_pictures(tmp_path, range(2))
    same = write_coco(tmp_path / "same.json", [image(0), image(0)], [])
    with pytest.raises(DataError, match=r"same.json: image id 0 comes twice; ids must be unique"):
        read(same)
    one = write_coco(tmp_path / "one.json", [image(0)], [said(0, "x")])
    other = write_coco(tmp_path / "other.json", [image(0, file_name="1.png")], [])
    with pytest.raises(DataError, match=r"image 0 is '1.png' here and '0.png' in the file before"):
        read(f"coco:{one},{other}")
    with pytest.raises(DataError, match=r"lists no images"):
        read(write_coco(tmp_path / "none.json", [], []))
    nameless = write_coco(tmp_path / "nameless.json", [{"id": 3}], [])
    with pytest.raises(DataError, match=r"need 'id' and 'file_name' of every image; got .*3"):
        read(nameless)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list.json is no COCO-style file: .*; it has a list"):
        read(tmp_path / "list.json")
    (tmp_path / "words.json").write_text(json.dumps({"images": [], "annotations": ["x"]}))
    with pytest.raises(DataError, match=r"no COCO-style file: .* it has annotations, categories"):
        read(tmp_path / "words.json")
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"cut.json is no JSON"):
        read(tmp_path / "cut.json")


def test_files_and_folders_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"need 'coco:ANNOTATIONS.json.*'/no/a.json' is no file"):
        open_source("coco:/no/a.json:images")
    with pytest.raises(DataError, match=r"need 'coco:ANNOTATIONS.json.*of 'coco:photos'"):
        open_source("coco:photos")
    path = write_coco(tmp_path / "deep" / "instances_val.json", [image(0)], [])
    message = r"found no image such as '0.png' beside .*images.*val.*name the folder, as in 'coco:"
    with pytest.raises(DataError, match=message):
        open_source(f"coco:{path}")
    with pytest.raises(DataError, match=r"need the folder of the images; '.*nowhere' is none"):
        open_source(f"coco:{path}:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"or 'coco:ANNOTATIONS.json\[,CAPTIONS.json\]"):
        open_source("/nowhere")
