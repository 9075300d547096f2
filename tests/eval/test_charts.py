"""Axes and curves."""

import pytest

from siglip2.eval.charts import line_chart, number, tick_label, ticks


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    for low, high in ((-5.51, -5.49), (0.001, 7e6), (3, 3.0001)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6
        assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in found[1:-1])
        assert len({tick_label(tick, found) for tick in found}) == len(found) or high == 3.0001


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.5e-4, "2.5e-4"), (0.1234, "0.123"), (1234.5, "1,234"), (5_700_000, "5.7 M")],
)
def test_number(value, text):
    assert number(value) == text


def test_a_chart_needs_two_finite_points():
    assert line_chart({"a": [(0, 1)], "b": []}, title="x") == ""
    assert line_chart({"a": [(0, 1), (1, float("nan"))]}, title="x") == ""
    text = line_chart({"a": [(0, 1), (1, 3)], "b": [(0, 2), (1, 2)]}, title="x")
    assert text.count("<polyline") == 2
    assert "a: 1 to 3; b: 2 to 2" in text
