import math

import pytest

from siglip2.recipe.schedules import warmup_cosine


@pytest.mark.parametrize(
    ("examples", "expected"),
    [(0, 0.0), (50, 0.5), (100, 1.0), (600, 0.5), (1100, 0.0), (5000, 0.0)],
)
def test_warms_up_linearly_then_follows_a_cosine_to_zero(examples, expected):
    assert warmup_cosine(examples, warmup=100, total=1100) == pytest.approx(expected, abs=1e-12)


def test_ends_at_the_floor():
    assert warmup_cosine(1100, warmup=100, total=1100, floor=0.1) == pytest.approx(0.1)


def test_starts_at_the_peak_without_warm_up():
    assert warmup_cosine(0, warmup=0, total=100) == 1.0


def test_is_the_published_schedule_at_its_quarter():
    # big_vision: min(1, step / warmup) * 0.5 * (1 + cos(pi * progress)),
    # progress from the end of the warm-up
    step, warmup, total = 250, 100, 700
    published = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    assert warmup_cosine(step, warmup=warmup, total=total) == pytest.approx(published)


def test_a_stage_that_begins_at_nine_tenths_runs_the_last_tenth_stretched():
    """NaFlex (SigLIP 2, section 2.4.2): 3.75 times as many examples for the last tenth."""
    whole, stage = 40e9, 0.1 * 40e9 * 3.75
    for share in (0.0, 0.3, 1.0):
        of_whole = warmup_cosine(whole * (0.9 + 0.1 * share), warmup=0, total=whole)
        of_stage = warmup_cosine(stage * share, warmup=0, total=stage, start=0.9)
        assert of_stage == pytest.approx(of_whole)
