"""Runs of words: none that a detector has no use for, all others once and in order."""

import pytest

from siglip2.data.ngrams import ngrams


def test_runs_come_in_order_without_stop_words_at_their_ends():
    assert ngrams("A brown dog on the grass", "en", most_words=5) == [
        "brown",
        "brown dog",
        "brown dog on the grass",
        "dog",
        "dog on the grass",
        "grass",
    ]
    assert ngrams("A brown dog on the grass", "en", most_words=2) == [
        "brown",
        "brown dog",
        "dog",
        "grass",
    ]
    assert ngrams("A brown dog", most_words=1) == ["brown", "dog"]  # English where not said


def test_runs_stop_at_punctuation_and_keep_what_joins_words():
    assert ngrams('red t-shirt, "o\u2019clock" (2024): dog\'s.') == [
        "red",
        "red t-shirt",
        "t-shirt",
        "o\u2019clock",
        "dog's",
    ]
    assert ngrams("two  dogs\n2 cats") == [
        "two",
        "two dogs",
        "two dogs 2",
        "two dogs 2 cats",
        "dogs",
        "dogs 2",
        "dogs 2 cats",
        "2 cats",
        "cats",
    ]
    assert ngrams("12 - 34 ... !?") == ngrams("") == ngrams("the of a") == []


def test_what_differs_in_case_alone_comes_once():
    assert ngrams("Dog, dog, DOG park") == ["Dog", "DOG park", "park"]


@pytest.mark.parametrize(
    ("language", "text", "some", "none"),
    [
        ("de", "Der Hund auf der Wiese", ["Hund", "Hund auf der Wiese", "Wiese"], ["der", "auf"]),
        ("fr-x-1", "Le chat de l\u2019hôtel", ["chat"], ["le", "de"]),
        ("ru", "Собака на траве", ["Собака", "Собака на траве"], ["на", "Собака на"]),
        ("en-GB", "the lift", ["lift"], ["the", "the lift"]),
        ("sw", "mbwa na paka", ["mbwa", "na", "mbwa na paka"], []),  # no list: nothing left out
        ("hi", "हरी घास पर कुत्ता", ["हरी", "हरी घास", "कुत्ता"], ["हर", "क"]),  # signs stay
        ("ko", "잔디 위의 개", ["잔디", "잔디 위의 개", "개"], []),
        (
            "zh",
            "草地上的黑狗",
            ["草", "草地", "狗", "黑狗", "草地上的黑狗"],
            ["的", "的黑狗", "黑 狗"],
        ),
        (
            "ja",
            "白い犬がソファーにいる",
            ["犬", "白い犬", "ソファー", "白い犬がソファー"],
            ["い", "が", "犬が", "ソ", "ファー"],
        ),
        ("th", "หมาสีดำ บนหญ้า", ["หมาสีดำ", "หมาสีดำ บนหญ้า", "บนหญ้า"], ["หมา"]),
        ("ar", "كلب في الحديقة", ["كلب", "كلب في الحديقة", "الحديقة"], ["في"]),
    ],
)
def test_languages(language, text, some, none):
    found = ngrams(text, language)
    assert not set(some) - set(found)
    assert not set(none) & set(found)
    assert all(run in text for run in found)
