"""COCO files and tables with regions, of pictures that tests write for themselves."""

import json

from data.made_files import picture

SIDE = 8  # of `picture`
CATEGORIES = [{"id": 1, "name": "dog"}, {"id": 7, "name": "traffic_light"}]


def image(i, **fields):
    return {"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE, **fields}


def boxed(image_id, bbox, category=1, **fields):
    return {"image_id": image_id, "bbox": bbox, "category_id": category, **fields}


def said(image_id, caption, **fields):
    return {"image_id": image_id, "caption": caption, **fields}


def write_coco(path, images, annotations, categories=CATEGORIES):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def write_pictures(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder
