"""Dense features in results: for scenes alone, in the console's table, beside another run's."""

from dataclasses import replace

from eval.tiny import tiny_model

from siglip2.config import DataConfig, EvalConfig
from siglip2.eval.dense_report import add_dense, dense_section
from siglip2.eval.runner import EvalResult
from siglip2.eval.table import format_table

FOUND = {
    "miou": 0.31,
    "object_miou": 0.3,
    "background_miou": 0.02,
    "pixel_accuracy": 0.9,
    "knn_accuracy": 0.625,
    "num_classes": 49,
    "num_train": 1000,
    "num_test": 500,
}
EMPTY = EvalResult({}, 0, "CPU")


def test_data_without_true_pixels_is_left_alone():
    found = add_dense(EMPTY, tiny_model(), {"mine": object()}, DataConfig(), EvalConfig())
    assert found is EMPTY


def test_the_table_and_the_metrics_have_every_source():
    result = replace(EMPTY, dense={"held_out": FOUND})
    assert result.metrics() == {
        f"val/held_out/dense/{name}": value for name, value in FOUND.items() if type(value) is float
    }
    assert result.to_dict()["dense"]["held_out"]["num_classes"] == 49
    *_, head, row = format_table(result).splitlines()
    columns = dict(zip([*head.split()[:4], "objects"], row.split(), strict=False))
    assert columns["source"] == "held_out"
    assert columns["mIoU"] == "31.0"
    assert row.split()[-1] == "62.5"


def test_the_page_sets_another_run_beside_and_escapes_names():
    page = dense_section({"<held>": FOUND}, {})
    assert "&lt;held&gt;" in page
    assert "<b>31.0 %</b><span>mIoU</span>" in page
    assert "48 things; probe fitted to 1,000 scenes" in page
    other = dense_section({"x": FOUND}, {"x": FOUND | {"miou": 0.25}})
    assert "mIoU; the other run 25.0 % (+6.0)" in other
