"""The bench harness through its real command: who is timed, who is refused, wrong requests."""

import csv
import sys
import types

import pytest
import torch

from siglip2_bench import ops, options, progress
from siglip2_bench.cli import main
from siglip2_bench.result import CSV_COLUMNS, read_json
from toy_case import TOY

LIGER_COLUMNS = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
    "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(ops, "names", lambda: ["toy_op"])
    monkeypatch.setattr(ops, "load", lambda op: TOY)


def run(*argv) -> int:
    return main([*map(str, argv), "--device", "cpu"])


def saved_result(folder, op):
    (path,) = folder.glob(f"cpu-*/{op}.json")
    return read_json(path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ops.names())
def test_smoke_shape_of_each_case(op, dtype, tmp_path, capsys):
    case = ops.load(op)
    providers = [name for name in case.rivals if not name.endswith("compile")]
    modes = ",".join(case.modes)  # some rivals refuse to run a backward twice
    argv = [op, "--providers", ",".join(providers), "--dtype", dtype, "--modes", modes]
    assert run(*argv, "--reps", 5, "--out", tmp_path) == 0
    rows = saved_result(tmp_path, op).rows
    assert {(row.provider, row.mode) for row in rows} == {
        (name, mode) for name in providers for mode in modes.split(",")
    }
    for row in rows:
        if row.status == "wrong" and not case.rivals[row.provider].is_ours:
            continue  # found out, as is the harness's task: torch's chunked head in bf16
        reason = case.rivals[row.provider].unsupported("cpu")
        assert (row.status, row.detail) == (("skipped", reason) if reason else ("ok", "")), row
        assert reason or 0 < row.time_ms.p20 <= row.time_ms.p50 <= row.time_ms.p80
    assert all(row.shape == case.shapes[0] for row in rows)
    assert "they say nothing about GPU kernels" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in ops.names() if "compile" in ops.load(op).rivals])
def test_compiled_rival_of_each_case(op, tmp_path):
    assert run(op, "--providers", "compile", "--modes", "full", "--out", tmp_path) == 0
    assert [row.status for row in saved_result(tmp_path, op).rows] == ["ok"]


def test_only_rivals_that_are_right_are_timed(toy, tmp_path, capsys):
    assert run("--modes", "full", "--out", tmp_path) == 0
    rows = {row.provider: row for row in saved_result(tmp_path, "toy_op").rows}
    assert list(rows) == list(TOY.rivals)
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "ok",
        "ours": "ok",
        "ours-cubed": "ok",
        "bad-gradient": "wrong",
        "inexact": "wrong",
        "nan": "wrong",
        "broken": "failed",
        "too-large": "out of memory",
        "foreseen": "skipped",
        "declines": "skipped",
        "absent": "skipped",
        "gpu-only": "skipped",
    }
    assert {name for name, row in rows.items() if row.time_ms} == {
        "eager",
        "ours",
        "ours-cubed",
    }
    assert rows["inexact"].error > 100
    lines = {
        line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "N=8" in line
    }
    assert lines["nan"].endswith("wrong (error nanx)")
    assert "wrong (error " in lines["bad-gradient"]
    assert lines["broken"].endswith("failed: RuntimeError: no such kernel image")
    assert lines["too-large"].endswith("out of memory")
    assert lines["declines"].endswith("skipped: needs a width of 7")
    assert lines["absent"].endswith("skipped: not installed (pip install no-such)")
    assert lines["gpu-only"].endswith("skipped: needs a CUDA device")


def test_a_rival_too_large_for_the_device_is_not_run(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("siglip2_bench.runner.memory_bytes", lambda device: 3 * 2**30)
    assert run("--providers", "eager,foreseen", "--out", tmp_path) == 0
    rows = {(row.provider, row.mode): row for row in saved_result(tmp_path, "toy_op").rows}
    assert rows["foreseen", "forward"].status == "ok"
    refused = rows["foreseen", "full"]
    assert refused.status == "skipped"
    assert refused.detail == "needs 1,099,511,627,776 GiB or more; the device has 3"
    assert refused.grad_errors.keys() == {"small", "large"}


def test_rivals_are_checked_in_each_regime(toy, tmp_path, capsys):
    file = tmp_path / "now.csv"
    names = ("eager", "ours-cubed", "bad-gradient")
    assert run("--providers", ",".join(names), "--modes", "full", "--save", file) == 0
    out = capsys.readouterr().out
    assert "grad error, small  grad error, large" in out
    lines = [line for line in csv.DictReader(file.open()) if "error" in line["metric_name"]]
    errors = {(x["kernel_provider"], x["metric_name"]): float(x["y_value_50"]) for x in lines}
    assert len(errors) == len(names) * 2
    assert {x["x_value"] for x in lines} == {str(TOY.check_shapes["cpu"]["N"])}
    # x.sum() adds a gradient of 1 to 2 x: it matters less where x is larger.
    wrong = [errors["bad-gradient", f"gradient error, {regime}"] for regime in TOY.regimes]
    assert 0.1 < wrong[0] < 2
    assert 50 < wrong[0] / wrong[1] < 200
    rounding = 2 * torch.finfo(torch.float32).eps
    assert all(
        errors[name, f"gradient error, {r}"] < rounding for name in names[:2] for r in TOY.regimes
    )


def test_the_share_of_the_measured_ceiling(toy, tmp_path):
    assert run("--providers", "eager", "--modes", "full", "--out", tmp_path) == 0
    (row,) = saved_result(tmp_path, "toy_op").rows
    flops = TOY.cost(**row.shape, dtype=torch.float32)["full"].flops
    assert row.gemm_tflops > 0
    assert row.gemm_share == pytest.approx(flops / (row.time_ms.p50 * 1e9) / row.gemm_tflops)


def test_the_target_shape_comes_first_after_the_smoke_shape():
    shapes = ops.load("sigmoid_loss").shapes
    assert shapes[1] == {"B": 65_536, "D": 768}
    assert {shape["D"] for shape in shapes[1:]} == {768, 1152, 1536}
    assert {shape["B"] for shape in shapes[1:]} == {4096 << i for i in range(7)}
    assert len(shapes) == 1 + 3 * 7


def test_eager_is_not_tried_where_no_device_can_hold_it():
    rivals = ops.load("sigmoid_loss").rivals
    shape, bf16 = {"B": 262_144, "D": 768}, torch.bfloat16
    for name in ("eager", "compile", "open_clip", "open_clip-chunked"):
        assert "GiB or more" in rivals[name].too_large("full", shape, bf16, 141 * 10**9), name
    assert "needs 768 GiB" in rivals["eager"].too_large("full", shape, bf16, 141 * 10**9)
    for name in ("siglip2", "siglip2-triton", "siglip2-cublas", "siglip-kernel"):
        assert rivals[name].too_large("full", shape, bf16, 80 * 10**9) is None, name


def test_without_out_a_cpu_run_writes_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("siglip2_bench.cli.results_dir", lambda: tmp_path / "results")
    assert run("toy_op", "--reps", 5) == 0
    assert not list(tmp_path.iterdir())


def test_saved_csv_has_liger_columns(toy, tmp_path):
    file = tmp_path / "now.csv"
    assert run("--sweep", "N=4:19", "--modes", "full", "--save", file) == 0
    assert file.read_text().splitlines()[0] == LIGER_COLUMNS + "siglip2_version"
    assert ",".join(CSV_COLUMNS) == LIGER_COLUMNS + "siglip2_version"
    lines = [line for line in csv.DictReader(file.open()) if line["metric_name"] == "speed"]
    assert [(line["kernel_provider"], line["x_value"]) for line in lines] == [
        (name, size) for size in ("4", "8", "16") for name in ("eager", "ours", "ours-cubed")
    ]
    assert all(line["extra_benchmark_config_str"] == '{"dtype": "fp32"}' for line in lines)
    assert all(0 < float(line["y_value_20"]) <= float(line["y_value_80"]) for line in lines)


def test_compare_with_a_saved_csv(toy, tmp_path, capsys):
    file = tmp_path / "then.csv"
    assert run("--modes", "full", "--save", file) == 0
    lines = file.read_text().splitlines()
    cells = next(csv.reader([lines[1]]))
    elsewhere = lines[1].replace(cells[12], "Another GPU")
    file.write_text("\n".join([lines[0], lines[1].replace(cells[8], "5000.0"), elsewhere]) + "\n")
    capsys.readouterr()
    assert run("--modes", "full", "--compare", file) == 0
    report = capsys.readouterr().out.partition("Compared with")[2]
    assert "eager" in report
    assert "5000.000" in report
    assert "ours" not in report
    assert f"1 line of {file} was measured on another machine" in report


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sigmod_loss"], "unknown op 'sigmod_loss'; did you mean 'sigmoid_loss'?"),
        (["--providers", "eagr"], "unknown provider 'eagr'; did you mean 'eager'?"),
        (["--modes", "fwd"], "unknown mode 'fwd'; did you mean 'forward'?"),
        (["--metric", "sped"], "unknown metric 'sped'; did you mean 'speed'?"),
        (["--metric", "memory"], "peak memory is measured on a CUDA device only"),
        (["--sweep", "B:4"], "need --sweep DIM=LOW:HIGH or DIM=SIZE,SIZE,...; got 'B:4'"),
        (["--sweep", "B=9:2"], "sizes of at least 1, the low one first; got 'B=9:2'"),
        (["--sweep", "B=0:2"], "sizes of at least 1, the low one first; got 'B=0:2'"),
        (
            ["sigmoid_loss", "--sweep", "Q=1:2"],
            "dimension of sigmoid_loss (B, D) to sweep; got 'Q'",
        ),
        (["--reps", "0"], "need --reps of at least 1; got 0"),
        (["--compare", "nothing.csv"], "there is no file nothing.csv"),
    ],
)
def test_wrong_requests_get_one_sentence(argv, message, capsys):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_asking_for_cuda_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "needs a CUDA device; torch finds none. --device cpu" in capsys.readouterr().err


def test_list_names_shapes_and_reasons(toy, capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "N=8 (trial run), N=16, N=32" in out
    assert "skipped: not installed (pip install no-such)" in out


def test_a_gpu_measures_all_but_the_smoke_shape():
    assert options.chosen_shapes("toy_op", TOY, None, "cuda") == [{"N": 16}, {"N": 32}]
    assert options.chosen_shapes("toy_op", TOY, "N=5,3", "cuda") == [{"N": 5}, {"N": 3}]


@pytest.fixture
def open_clip(monkeypatch, tmp_path):
    """A package whose loss is a file of its own, and whose other parts cannot be imported."""
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("import no_torchvision_for_this_torch")
    (package / "loss.py").write_text(
        "class SigLipLoss:\n"
        "    def __init__(self, rank=0): pass\n"
        "    def __call__(self, img, txt, scale, bias): return scale * (img @ txt.T).sum() + bias\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_open_clip_without_chunks_is_skipped_by_name(open_clip):
    with pytest.raises(NotImplementedError, match="SigLipLoss has no chunk_size"):
        ops.load("sigmoid_loss").rivals["open_clip-chunked"].build()


def test_open_clip_needs_its_loss_file_alone(open_clip):
    loss = ops.load("sigmoid_loss").rivals["open_clip"].build()
    ones = torch.ones(2, 3)
    assert loss(ones, ones, torch.tensor(0.0), torch.tensor(-2.0)) == 10


def test_siglip_kernel_is_called_with_small_chunks(monkeypatch):
    calls = []
    package = types.ModuleType("siglip_kernel")
    package.fused_chunked_bf16_siglip_loss = lambda *args, **options: calls.append((args, options))
    monkeypatch.setitem(sys.modules, "siglip_kernel", package)
    ops.load("sigmoid_loss").rivals["siglip-kernel-1024"].build()("img", "txt", "log_scale", "bias")
    assert calls == [(("img", "txt", "log_scale", "bias"), {"chunk_size": 1024})]


def test_progress_speaks_only_after_two_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    say = progress.Progress()
    for second, text in ((1.9, "early"), (2.1, "first"), (3.0, "too soon"), (4.2, "second")):
        now[0] = second
        say(text)
    assert capsys.readouterr().err == "first\nsecond\n"
