"""Detectors of painted rectangles, right about some of what they are asked, wrong about some."""

import os
import signal
import time

import numpy as np
from PIL import Image


def colours(image, phrases):
    """What is painted in the colour that is named, as it is; every other phrase with a low score,
    everywhere; "blue" always a second time, nearly in its place; "green" beyond the edge.
    """
    pixels = np.asarray(image)
    for index, phrase in enumerate(phrases):
        where = {"red": 0, "green": 1, "blue": 2}.get(phrase)
        if where is None:
            yield index, 0.1, (0, 0, image.width, image.height)
            continue
        painted = np.argwhere((pixels[..., where] == 255) & (pixels.sum(-1) == 255))
        if len(painted):
            (y0, x0), (y1, x1) = painted.min(0), painted.max(0) + 1
            yield index, 0.9 - 0.1 * where, (x0, y0, x1 + 50 * (phrase == "green"), y1)
            if phrase == "blue":
                yield index, 0.6, (x0 + 1, y0, x1 + 1, y1)


def mute(image, phrases):
    return []


def wrong_index(image, phrases):
    return [(len(phrases), 0.5, (0, 0, 1, 1))]


def killed(image, phrases):
    """Ends its process, as kill -9 does, at the picture that a file counts up to."""
    path = os.environ["PICTURES_LEFT"]
    with open(path) as file:
        left = int(file.read())
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    with open(path, "w") as file:
        file.write(str(left - 1))
    return colours(image, phrases)


def paint(path, **boxes):
    """A picture of 40 x 30 with a rectangle of each colour."""
    canvas = Image.new("RGB", (40, 30), "white")
    for colour, (x0, y0, x1, y1) in boxes.items():
        rgb = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[colour]
        canvas.paste(rgb, (x0, y0, x1, y1))
    canvas.save(path)
