"""Boxes as words and back, and what each task says."""

import pytest
from locca.test_decoder import Words

from siglip2.locca.tasks import ImageTexts, box_to_text, prompts, task_texts, text_to_box


def test_a_box_is_four_numbers_down_before_across():
    assert box_to_text((0.1, 0.2, 0.6, 1.0)) == "100 50 500 300"
    assert text_to_box("100 50 500 300 : a dog") == (0.1, 0.2, 0.6, 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_box_comes_back_within_half_a_step(seed):
    import random

    g = random.Random(seed)
    (x0, x1), (y0, y1) = (sorted((g.uniform(0, 0.45), g.uniform(0.5, 1))) for _ in range(2))
    found = text_to_box(box_to_text((x0, y0, x1, y1)))
    assert all(abs(a - b) <= 0.001 + 1e-12 for a, b in zip(found, (x0, y0, x1, y1), strict=True))


@pytest.mark.parametrize("text", ["", "1 2 3", "5 5 5 9", "9 1 2 3", "0 0 501 7", "a dog"])
def test_what_is_no_box_gives_none(text):
    assert text_to_box(text) is None


@pytest.mark.parametrize(
    "box", [(0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (float("nan"), 0, 1, 1)], ids=str
)
def test_rejects_what_is_no_box(box):
    with pytest.raises(ValueError, match=r"need a box \(x0, y0, x1, y1\)"):
        box_to_text(box)


def test_three_texts_with_their_prefixes():
    words = Words()
    image = ImageTexts("A dog runs", "the dog", (0.0, 0.0, 0.5, 1.0))
    texts = task_texts(image, words, 64)
    name = {number: word for word, number in words.known.items()}
    said = [" ".join(name.get(i, "<eos>") for i in text.ids) for text in texts]
    assert said == [
        "cap: a dog runs <eos>",
        "aref: the dog : 0 0 500 250 <eos>",
        "gcap: 0 0 500 250 : the dog <eos>",
    ]
    assert [text.prefix for text in texts] == [1, 1, 1]
    asked = prompts("refer", ["the dog", "a cat there"], words)
    assert asked[0] == list(texts[1].ids[:4])
    assert len(asked[1]) == 5
    assert prompts("caption", [""], words) == [list(texts[0].ids[:1])]


def test_long_texts_are_cut_and_end():
    texts = task_texts(ImageTexts("one two three four five"), Words(), 4)
    assert len(texts[0].ids) == 4
    assert texts[0].ids[-1] == 1


def test_an_image_of_which_nothing_is_known_says_nothing():
    assert task_texts(ImageTexts(), Words(), 8) == []
    assert [t.task for t in task_texts(ImageTexts(box=(0, 0, 1, 1)), Words(), 8)] == []
