"""`make gpu`, with a CPU in the GPU's place, and what is known of GPUs."""

import contextlib
import json

import pytest
import torch

from siglip2_bench import gpu, gpu_cases, gpu_checks, gpu_state, ops
from siglip2_bench.machine import peak_of, this_machine
from siglip2_bench.result import read_json
from siglip2_bench.timing import cuda_times, memory_of
from toy_case import TOY


@pytest.mark.parametrize(
    ("name", "tflops", "tbytes_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 3.35),
        ("NVIDIA H100 PCIe", 756, 2.0),
        ("NVIDIA H200", 989, 4.8),
        ("NVIDIA A100-SXM4-80GB", 312, 2.0),
        ("NVIDIA A100-SXM4-40GB", 312, 1.555),
        ("NVIDIA B200", 2250, 8.0),
    ],
)
def test_dense_peaks_by_name(name, tflops, tbytes_per_s):
    peak = peak_of(name)
    assert (peak.tensor_tflops, peak.tbytes_per_s) == (tflops, tbytes_per_s)


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L4", "AMD EPYC"])
def test_unknown_devices_have_no_peak(name):
    assert peak_of(name) is None


def test_make_gpu_without_a_gpu_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA GPU, and torch finds none here" in capsys.readouterr().err


PASSED = {"ok": True, "passed": 3, "skipped": 0, "seconds": 1.0, "failures": {}}


@pytest.fixture
def as_gpu(monkeypatch):
    """`make gpu` with a CPU in the GPU's place."""
    machine = this_machine("cpu")
    monkeypatch.setattr(ops, "names", lambda: ["toy_op"])
    monkeypatch.setattr(ops, "load", lambda op: TOY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "this_machine", lambda device: machine)
    monkeypatch.setattr(gpu_checks, "run_tests", lambda folder: PASSED)
    no_tool = {"ok": True, "skipped": "no tool"}
    monkeypatch.setattr(gpu_checks, "run_sanitizer", lambda ops: no_tool)


def checks(folder, name):
    (path,) = folder.glob(f"*/checks/{name}.json")
    return json.loads(path.read_text())


def test_make_gpu_times_ops_though_a_test_fails(as_gpu, monkeypatch, tmp_path, capsys):
    failed = PASSED | {"ok": False, "failures": {"tests/test_a.py::test_b": "assert 1 == 2"}}
    monkeypatch.setattr(gpu_checks, "run_tests", lambda folder: failed)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "3 passed, 1 failed, 0 skipped" in captured.out
    assert "tests/test_a.py::test_b: assert 1 == 2" in captured.out
    assert "not right: tests; see" in captured.err
    assert checks(tmp_path, "tests")["failures"] == failed["failures"]
    assert set(checks(tmp_path, "ceilings")) >= {"product_tflops", "copy_tbytes_per_s", "machine"}
    assert list(tmp_path.glob("*/toy_op.json"))
    assert gpu.main(["--out", str(tmp_path)]) == 1, "a second run knows that a test failed"
    monkeypatch.setattr(gpu_checks, "run_tests", lambda folder: PASSED)
    assert gpu.main(["--out", str(tmp_path), "--only", "tests"]) == 0


def test_make_gpu_goes_on_where_it_was_cut(as_gpu, monkeypatch, tmp_path):
    measured = []

    def run_case(request, verdicts):
        if len(measured) == 2:
            measured.append("cut")
            raise KeyboardInterrupt
        measured.append(request.shapes[0]["N"])
        return original(request, verdicts)

    original = gpu_cases.run_case
    monkeypatch.setattr(gpu_cases, "run_case", run_case)
    with contextlib.suppress(KeyboardInterrupt):
        gpu.main(["--out", str(tmp_path)])
    monkeypatch.setattr(gpu_checks, "run_tests", lambda folder: pytest.fail("they ran before"))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert measured == [8, 16, "cut", 32]
    (results,) = tmp_path.glob("*/toy_op.json")
    assert {row.shape["N"] for row in read_json(results).rows} == {8, 16, 32}
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert measured == [8, 16, "cut", 32]

    monkeypatch.setattr(gpu_state, "source_digest", lambda: "other code")
    monkeypatch.setattr(gpu_checks, "run_tests", lambda folder: PASSED)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert measured == [8, 16, "cut", 32, 8, 16, 32]


@pytest.mark.gpu
@pytest.mark.timing
def test_cuda_times_of_a_copy_are_possible():
    source = torch.randn(2**28, device="cuda")
    call = source.clone
    call()
    times_s = [ms / 1e3 for ms in cuda_times(call, 10, lead_cycles=1_000_000)]
    peak = peak_of(torch.cuda.get_device_name())
    assert peak is not None, "list this GPU in bench/machine.py"
    floor_s = 2 * source.nbytes / (peak.tbytes_per_s * 1e12)
    assert floor_s <= sorted(times_s)[5] < 3 * floor_s
    assert memory_of(call) == (source.nbytes / 2**20, source.nbytes / 2**20)
