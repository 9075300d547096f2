"""What becomes of rows: JSON, the README's table, plots, geometric means."""

import math
from dataclasses import replace

import pytest

from siglip2.errors import DataError
from siglip2_bench import readme
from siglip2_bench.cli import save
from siglip2_bench.machine import ROOT, Machine, results_dir
from siglip2_bench.plot import save_plot
from siglip2_bench.report import compare, console, geometric_mean, markdown
from siglip2_bench.result import Result, Row, csv_rows, read_csv, read_json, write_csv, write_json
from siglip2_bench.timing import Quantiles

GPU = Machine(
    device="cuda",
    name="NVIDIA H100 80GB HBM3",
    torch="2.11.0",
    triton="3.6.0",
    python="3.12.3",
    siglip2="0.1.0",
    driver="580.1",
)


def row(provider, size, ms=None, *, mode="full", **fields):
    times = None if ms is None else Quantiles(0.9 * ms, ms, 1.1 * ms)
    fields = {"status": "ok", "peak_mib": 64.0 if ms else None, "commit": "abc1234", **fields}
    if ms is not None:
        fields |= {"gemm_tflops": 700.0, "gemm_share": 0.5 / ms}
    return Row(
        op="toy_op",
        provider=provider,
        mode=mode,
        dtype="bf16",
        shape={"N": size, "D": 8},
        time_ms=times,
        **fields,
    )


ROWS = [
    row("eager", 16, 4.0, error=0.5, grad_errors={"scale 10": 3e-3, "scale 117": 1.4e-2}),
    row("ours", 16, 2.0),
    row("rival", 16, 3.0),
    row("eager", 32, 16.0),
    row("ours", 32, 2.0),
    row("rival", 32, status="out of memory"),
    row("wrong-one", 16, status="wrong", detail="error 37x", error=37.0),
    row("wrong-one", 32, status="wrong", detail="error 37x", error=37.0),
    row("absent", 16, status="skipped", detail="not installed (pip install absent)"),
    row("late", 32, 1.0),
    row("ours", 16, 0.25, mode="forward"),
]
RESULT = Result(
    op="toy_op",
    x_name="N",
    x_label="numbers",
    baseline="eager",
    check_shape={"N": 20, "D": 8},
    machine=GPU,
    ours=["ours"],
    rows=ROWS,
)


@pytest.fixture
def readme_file(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    return path


def test_json_round_trip_into_the_readme(tmp_path, readme_file):
    path = save(RESULT, tmp_path)
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "toy_op.json"
    assert read_json(path) == RESULT
    assert "does not match" in readme.problem(readme_file, tmp_path)
    readme.update(readme_file, tmp_path)
    assert readme.problem(readme_file, tmp_path) is None
    text = readme_file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (
        "| N=16 D=8 | 4.000 / 64 / 12% | 2.000 / 64 / 25% | 3.000 / 64 / 17% | not measured |"
        in text
    )
    assert (
        "| N=32 D=8 | 16.000 / 64 / 3% | 2.000 / 64 / 25% | out of memory | 1.000 / 64 / 50% |"
        in text
    )
    assert "gradients against float64, bf16, N=20 D=8:" in text
    assert "| eager | 3.0e-03 | 1.4e-02 |" in text
    assert "NVIDIA H100 80GB HBM3" in text
    assert "commit abc1234" in text
    assert "wrong-one (wrong: error 37x)" in text
    assert "absent (skipped: not installed (pip install absent))" in text
    # eager: sqrt(2 * 8); the fastest rival: sqrt(1.5 * 0.5), late being the fastest at 32.
    assert "4.00x eager (2 of 2 shapes), 0.87x the fastest rival (2 of 2 shapes)" in text

    write_json(path, replace(RESULT, rows=[row("ours", 16, 1.0)]))
    assert "does not match" in readme.problem(readme_file, tmp_path)


def test_readme_without_gpu_results_says_so(tmp_path, readme_file):
    save(replace(RESULT, machine=replace(GPU, device="cpu", name="AMD EPYC")), tmp_path)
    readme.update(readme_file, tmp_path)
    assert "Not measured on a GPU yet" in readme_file.read_text()
    assert "4.000" not in readme_file.read_text()


def test_readme_needs_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("no markers")
    with pytest.raises(DataError, match="need the lines <!-- bench:begin -->"):
        readme.update(path, tmp_path)
    assert "need the lines" in readme.problem(path, tmp_path)
    assert path.read_text() == "no markers"


def test_this_projects_readme_shows_its_results():
    assert readme.problem(ROOT / "README.md", results_dir()) is None


def test_a_later_run_replaces_only_what_it_measured(tmp_path):
    path = tmp_path / "toy_op.json"
    write_json(path, RESULT)
    write_json(path, replace(RESULT, rows=[row("ours", 16, 1.0), row("new", 16, 5.0)]))
    rows = read_json(path).rows
    assert len(rows) == len(ROWS) + 1
    by_key = {r.key: r for r in rows}
    assert by_key[row("ours", 16).key].time_ms.p50 == 1.0
    assert by_key[row("eager", 16).key].time_ms.p50 == 4.0


def test_rows_of_other_software_are_dropped(tmp_path):
    path = tmp_path / "toy_op.json"
    write_json(path, RESULT)
    later = replace(RESULT, machine=replace(GPU, torch="2.12.0"), rows=[row("ours", 16, 1.0)])
    write_json(path, later)
    assert read_json(path) == later


def test_tables_print_no_time_for_a_wrong_rival():
    text = console(RESULT)
    lines = [line for line in text.splitlines() if "wrong-one" in line]
    assert all(line.endswith("wrong (error 37x)") for line in lines)
    assert len(lines) == 2
    widths = {len(line) for line in text.splitlines() if line.startswith("N=32") and "16.0" in line}
    header = next(line for line in text.splitlines() if line.startswith("shape"))
    assert widths == {len(header)}
    assert "4.00x eager (2 shapes), 1.50x rival (1 shape), 0.50x late (1 shape)" in text
    assert "GEMM, one large matrix product in turn: 700-700 TFLOP/s" in text
    assert "| N=16 D=8 | wrong-one | wrong (error 37x) |" in markdown(RESULT)


def test_geometric_mean():
    assert math.isclose(geometric_mean([0.5, 2.0, 8.0]), 2.0)


def test_compare_gives_the_ratio_of_medians(tmp_path):
    then = replace(RESULT, rows=[row("ours", 16, 8.0), row("ours", 64, 1.0)])
    elsewhere = replace(then, machine=replace(GPU, name="NVIDIA H200"))
    path = tmp_path / "then.csv"
    write_csv(path, [*csv_rows(then, ("speed",)), *csv_rows(elsewhere, ("speed",))])
    text = compare([RESULT], read_csv(path), "then.csv")
    (line,) = [line for line in text.splitlines() if "ours" in line]
    assert line.split() == ["toy_op", "ours", "full", "speed", "N=16", "8.000", "2.000", "0.250"]
    assert "2 lines of then.csv were measured on another machine" in text
    assert compare([], read_csv(path), "then.csv").startswith("Nothing in then.csv matches")


def test_csv_gives_errors_at_the_shape_of_the_check():
    (first, second) = [line for line in csv_rows(RESULT) if "error" in line["metric_name"]]
    assert (first["metric_name"], first["metric_unit"]) == (
        "gradient error, scale 10",
        "relative L2",
    )
    assert (first["x_value"], first["y_value_50"]) == (20, 3e-3)
    assert second["y_value_80"] == 1.4e-2


def test_csv_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="other columns"):
        read_csv(path)


def test_each_other_size_gets_its_own_lines(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    wider = [replace(r, shape={**r.shape, "D": 16}) for r in ROWS if r.provider == "ours"]
    assert save_plot(tmp_path / "both.png", replace(RESULT, rows=[*ROWS, *wider]))
    axes = drawn[0].axes
    assert [a.get_title() for a in axes[::3]] == ["D=8", "D=16"]
    assert len(axes) == 6
    for panel in axes:
        for line in panel.get_lines():
            assert len(set(line.get_xdata())) == len(line.get_xdata())
    assert [line.get_label() for line in axes[3].get_lines()] == ["ours"]


def test_plot_needs_two_sizes(tmp_path):
    pytest.importorskip("matplotlib")
    assert not save_plot(tmp_path / "one.png", replace(RESULT, rows=ROWS[:3]))
    assert save_plot(tmp_path / "two.png", RESULT)
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "one.png").exists()
