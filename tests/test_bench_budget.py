"""Benches within their time, and what `make gpu` runs beside them."""

import lzma
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from siglip2.errors import ConfigError
from siglip2_bench import gpu, gpu_checks, gpu_state, smallest, wheels
from siglip2_bench.budget import Budget, OutOfTime
from siglip2_bench.case import Rival
from siglip2_bench.machine import this_machine
from siglip2_bench.result import read_json
from siglip2_bench.runner import Request, run_case
from siglip2_bench.timing import time_rivals
from toy_case import TOY


@contextmanager
def nothing():
    yield lambda: None


@contextmanager
def slow():
    yield lambda: time.sleep(0.05)


@contextmanager
def stuck():
    def call():
        while True:
            time.sleep(0.001)

    yield call


def test_a_budget_without_an_end_refuses_nothing():
    budget = Budget()
    budget.ask(1e9)
    with budget.half_of_what_is_left():
        pass


def test_what_is_stuck_costs_half_and_the_others_are_timed():
    start = time.monotonic()
    samples = time_rivals(
        {"first": nothing, "stuck": stuck, "last": nothing}, device="cpu", budget=Budget(2.0)
    )
    assert time.monotonic() - start < 3
    assert isinstance(samples["stuck"].error, OutOfTime)
    assert "took over 1 s, half of what was left of 2" in str(samples["stuck"].error)
    assert samples["first"].times_ms
    assert samples["last"].times_ms


def test_a_rival_is_let_in_while_it_leaves_time_for_those_before_it():
    # 20 calls of 50 ms each, and as many again to warm up: of 2.5 s one takes 1.3, a second none.
    samples = time_rivals(
        {"one": slow, "two": slow, "three": slow}, device="cpu", budget=Budget(2.5)
    )
    assert len(samples["one"].times_ms) >= 5
    assert "no time left of the 2 s" in str(samples["three"].error)


def request(**fields):
    shapes, modes = TOY.shapes[:1], ["full"]
    machine = this_machine("cpu")
    return Request(
        op="toy_op", case=TOY, machine=machine, dtype="fp32", shapes=shapes, modes=modes, **fields
    )


def test_dropped_rivals_say_so(monkeypatch):
    budget = Budget(100)
    result = run_case(request(budget=budget, providers=["eager", "ours"]))
    assert not any(row.dropped for row in result.rows)
    rows = run_case(request(budget=Budget(1e-6), providers=["eager", "ours"])).rows
    assert [(row.status, row.dropped) for row in rows] == [("skipped", True)] * 2
    assert "no time left" in rows[0].detail


def test_rivals_that_take_long_to_check_leave_time_to_measure_the_others():
    def stuck():
        time.sleep(60)

    case = replace(TOY, rivals=TOY.rivals | {"stuck": Rival(build=stuck)})
    asked = replace(request(budget=Budget(4), providers=["eager", "stuck", "ours"]), case=case)
    rows = {row.provider: row for row in run_case(asked).rows}
    assert rows["eager"].status == rows["ours"].status == "ok"
    assert rows["stuck"].dropped
    assert asked.budget.left > 0


def test_a_rival_that_ended_cuda_is_not_run_again():
    wrecked = request(providers=["eager", "ours"], broken={"ours": "illegal memory access"})
    rows = {row.provider: row for row in run_case(wrecked).rows}
    assert (rows["ours"].status, rows["ours"].detail) == ("failed", "illegal memory access")
    assert rows["eager"].status == "ok"


def test_a_rivals_own_bound_of_errors(monkeypatch):
    inexact = replace(TOY.rivals["inexact"], max_error=1e9)
    case = replace(TOY, rivals=TOY.rivals | {"inexact": inexact})
    asked = replace(request(providers=["eager", "inexact"]), case=case)
    row = run_case(asked).rows[1]
    assert row.status == "ok"
    assert row.error > 100


def test_what_a_run_did_is_forgotten_with_other_code(tmp_path, monkeypatch):
    machine = this_machine("cpu")
    path = tmp_path / "state.json"
    state = gpu_state.State.load(path, machine)
    state.done.append("toy_op fp32 N=8")
    state.checks["tests"] = False
    state.broken["toy_op"] = {"ours": "illegal memory access"}
    state.write()
    assert gpu_state.State.load(path, machine) == state
    assert gpu_state.State.load(path, machine, restart=True).done == []
    monkeypatch.setattr(gpu_state, "source_digest", lambda: "other")
    assert gpu_state.State.load(path, machine).done == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "bnech"], "unknown part 'bnech'; did you mean 'bench'?"),
        (["--ops", "sigmoid"], "unknown op 'sigmoid'"),
        (["--skip", "ligr"], "unknown provider 'ligr'; did you mean 'liger'"),
        (["--seconds", "0"], "need --seconds above 0; got 0"),
        (["--wheels", "/no/such/folder"], "need a folder of .whl files; got /no/such/folder"),
    ],
)
def test_make_gpu_refuses_what_it_cannot_do(argv, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert gpu.main(argv) == 2
    assert message in capsys.readouterr().err


def make_wheel(folder, name="thing_of_tests", version="1.2"):
    """The least that pip installs."""
    import zipfile

    folder.mkdir()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "ANSWER = 42\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.mark.parametrize("is_compressed", [False, True])
def test_wheels_are_importable_here_and_in_child_processes(tmp_path, monkeypatch, is_compressed):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.delitem(sys.modules, "thing_of_tests", raising=False)
    folder = make_wheel(tmp_path / "wheels")
    if is_compressed:
        (path,) = folder.iterdir()
        path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes()))
        path.unlink()
    wheels.install(folder, tmp_path / "target")
    import thing_of_tests

    assert thing_of_tests.ANSWER == 42
    code = "import thing_of_tests; print(thing_of_tests.ANSWER)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "42", done.stderr
    rival = replace(TOY.rivals["absent"], module="thing_of_tests", pip="thing-of-tests")
    case = replace(TOY, rivals=TOY.rivals | {"thing": rival})
    assert wheels.rivals([case], "cpu").splitlines() == [
        "rivals here: thing-of-tests 1.2",
        "rivals that are not: no-such: not installed (pip install no-such)",
    ]


def test_a_wheel_that_pip_refuses_is_named(tmp_path):
    (tmp_path / "no-1.0-py3-none-any.whl").write_text("no zip archive")
    with pytest.raises(ConfigError, match=r"need wheels that pip installs here; .*no-1\.0"):
        wheels.install(tmp_path, tmp_path / "target")


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_a" name="test_b[x]"/>
<testcase classname="tests.kernels.test_a" name="test_c"><skipped message="no CUDA"/></testcase>
<testcase classname="tests.kernels.test_a" name="test_d"><failure message="AssertionError: dx
and more">trace</failure></testcase>
<testcase classname="tests.kernels.test_a" name="test_d"><error message="crashed"/></testcase>
</testsuite></testsuites>"""


def test_the_first_reason_of_a_failed_test_is_kept(tmp_path):
    (tmp_path / "report.xml").write_text(JUNIT)
    record = gpu_checks.read_junit(tmp_path / "report.xml")
    assert (record["passed"], record["skipped"]) == (1, 1)
    (failure,) = record["failures"].items()
    assert failure[0] == "tests/kernels/test_a.py::test_d"
    assert failure[1].startswith("AssertionError: dx")
    lines = gpu_checks.summary("tests", {**record, "seconds": 3.0, "ok": False})
    assert lines[0] == "GPU tests: 1 passed, 1 failed, 1 skipped in 3 s"


def test_files_with_gpu_tests_are_found():
    files = gpu_checks.files_with_gpu_tests()
    for name in ("kernels/test_sigmoid_loss.py", "kernels/test_core.py", "test_bench_gpu.py"):
        assert f"tests/{name}" in files
    assert "tests/test_architecture.py" not in files


FAKE_TOOL = """#!{python}
import sys
at = sys.argv.index("--tool")
if sys.argv[at + 1] == "racecheck" and sys.argv[-1] == "map_pool":
    print("========= ERROR: Race reported between Write access at _fwd_kernel")
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    sys.exit(86)
print("========= ERROR SUMMARY: 0 errors")
"""


def test_each_tool_runs_over_each_op(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    record = gpu_checks.run_sanitizer(["bias_gelu", "map_pool"])
    runs = {(run["tool"], run["op"]): run for run in record["runs"]}
    assert len(runs) == 4
    assert not record["ok"]
    assert [pair for pair, run in runs.items() if not run["ok"]] == [("racecheck", "map_pool")]
    assert "Race reported" in runs["racecheck", "map_pool"]["output"]
    lines = gpu_checks.summary("sanitizer", record)
    assert any("map_pool" in line and "1 hazard displayed" in line for line in lines)


def test_without_the_tool_the_record_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compute-sanitizer is not installed" in gpu_checks.run_sanitizer(["map_pool"])["skipped"]


@pytest.mark.parametrize("op", smallest.names())
def test_every_op_runs_at_its_smallest_size(op):
    assert any(name.startswith("siglip2") for name in smallest.run(op, "cpu"))


def test_workspace_is_what_is_neither_returned_nor_an_accumulator():
    from siglip2_bench.runner import memory_fields
    from siglip2_bench.timing import Memory

    rival = replace(TOY.rivals["ours"], accumulator_bytes=lambda mode, *, N: 2**20 * N)
    asked = replace(request(), case=replace(TOY, rivals={"ours": rival}))
    memory = Memory(peak_mib=100.0, returned_mib=30.0)
    found = memory_fields(asked, {"N": 8}, "full", "ours", memory)
    assert found == {"peak_mib": 100.0, "workspace_mib": 62.0}
    assert memory_fields(asked, {"N": 8}, "full", "ours", None) == {}


def test_results_carry_what_was_dropped(tmp_path):
    from siglip2_bench.cli import save

    dropped = run_case(request(budget=Budget(1e-6), providers=["eager"]))
    assert read_json(save(dropped, tmp_path)).rows[0].dropped
