"""The page's section on resolutions."""

from eval.test_report import ATTACK, Page

from siglip2.eval.resolutions import budget_section


def row(budget, source, recall, *, seen=True):
    mean = {"i2t_r1": recall, "t2i_r1": recall / 2, "chance_i2t_r1": 0.01}
    return {
        "budget": budget,
        "seen": seen,
        "num_patches": budget - 0.5,
        "source": source,
        "subset": "all",
        "mean": mean,
    }


def test_each_budget_is_a_line_and_each_source_a_curve():
    rows = [row(n, s, n / 200, seen=n != 9) for s in ("seen", ATTACK) for n in (9, 16, 64)]
    section = budget_section(rows)
    page = Page(section)
    assert [tag for tag, _ in page.tags].count("tr") == 1 + len(rows)
    assert [tag for tag, _ in page.tags].count("polyline") == 2
    assert "<script>" not in section
    for words in ("8.5", "no", "4.5 %", "32 %", "16 %", "1.0 %"):
        assert words in page.words
