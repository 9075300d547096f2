"""What of a detector's answers becomes a region."""

from collections import Counter

import numpy as np
import pytest
from data.made_detectors import mute, wrong_index
from PIL import Image

from siglip2.data.detect import BoxOptions, find_regions, suppressed
from siglip2.errors import DataError


def test_a_phrase_of_two_languages_is_asked_once():
    asked = []

    def detect(image, phrases):
        asked.append(list(phrases))
        return [(phrases.index("taxi"), 0.5, (0, 0, 4, 4))]

    captions = {"en": "a taxi", "en-x-1": "the taxi", "de": "taxi rot", "fr": "chat"}
    options = BoxOptions(languages=("en", "de"))
    [found] = find_regions(Image.new("RGB", (8, 8)), captions, detect, options, Counter())
    assert asked == [["taxi", "taxi rot", "rot"]]
    assert found.phrases == {"en": "taxi", "de": "taxi"}


def test_the_best_boxes_are_kept_up_to_the_most():
    def detect(image, phrases):
        return [(0, 0.3 + 0.1 * i, (10 * i, 0, 10 * i + 9, 9)) for i in range(5)]

    counts = Counter()
    image = Image.new("RGB", (60, 10))
    found = find_regions(image, {"en": "dog"}, detect, BoxOptions(most_boxes=2), counts)
    assert [region.box[0] for region in found] == [40, 30]
    assert counts["dropped: over the most a picture"] == 3
    assert find_regions(image, {"en": "dog"}, mute, BoxOptions(), counts) == []
    assert find_regions(image, {"en": "the"}, wrong_index, BoxOptions(), counts) == []  # not asked


def test_suppression_keeps_the_best_of_what_overlaps():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [20, 0, 30, 10]], dtype=float)
    scores = np.array([0.5, 0.9, 0.4, 0.5])
    assert suppressed(boxes, scores, 0.5) == [1, 3, 2]  # of 0 and 1, the better; IoU of 2 is 4 / 9
    assert suppressed(boxes, scores, 0.4) == [1, 3]
    assert suppressed(boxes, scores, 1.0) == [1, 0, 3, 2]


@pytest.mark.parametrize(
    "answer",
    [(1, 0.5, (0, 0, 1, 1)), (0, float("nan"), (0, 0, 1, 1)), (0, 0.5, (0, 0, 1)), (0, 0.5)],
)
def test_an_answer_that_is_no_box_of_a_phrase_ends_the_run(answer):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(DataError, match=r"need a detector's \(phrase index below 1, score"):
        find_regions(image, {"en": "dog"}, lambda *_: [answer], BoxOptions(), Counter())
