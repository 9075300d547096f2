"""Correctness on the GPU: its tests, and compute-sanitizer over every kernel."""

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import smallest
from .machine import ROOT

TOOLS = ("memcheck", "racecheck")
TEST_SECONDS = 120  # a test that takes longer is stuck
TOOL_SECONDS = 150  # compute-sanitizer, for one op
NO_TESTS_COLLECTED = 5  # pytest's exit status
SANITIZER_FOUND_ERRORS = 86  # the exit status that it is asked for
OUTPUT_CHARACTERS = 4000  # of a sanitizer's report that is kept
# A worker compiles on one core, which takes most of its time; what they share is the GPU.
MOST_WORKERS = 16
# By themselves, or by the runners that tests/strategies.py gives to most tests of kernels.
_SIGN_OF_GPU_TESTS = re.compile(r"mark\.gpu|\bRUNNERS\b|runners_and_dtypes")

Record = dict[str, Any]


def run_tests(folder: Path) -> Record:
    """`pytest -m gpu tests`: several at a time, then those that want the device for themselves."""
    together = _pytest(folder / "together.xml", "gpu and not timing", workers=_workers())
    alone = _pytest(folder / "alone.xml", "gpu and timing", workers=0)
    keys = ("passed", "skipped", "seconds")
    record = {key: together[key] + alone[key] for key in keys}
    failures = {**together["failures"], **alone["failures"]}
    return {**record, "failures": failures, "ok": not failures}


def files_with_gpu_tests() -> list[str]:
    """Others may need packages that a GPU machine without network lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in files if _SIGN_OF_GPU_TESTS.search(p.read_text())]


def _workers() -> int:
    return min(MOST_WORKERS, os.cpu_count() or 1) if find_spec("xdist") else 0


def _pytest(report: Path, marks: str, *, workers: int) -> Record:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "--durations=15"]
    command += ["-m", marks, f"--junitxml={report}", *files_with_gpu_tests()]
    if workers:
        command += ["-n", str(workers), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        command += [f"--timeout={TEST_SECONDS}"]
    # PYTHONSAFEPATH is -P for pytest's workers: on sys.path the checkout's kernels/ would hide a
    # package.  One thread and one compiling process each: the workers are parallel already.
    single = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    start = time.monotonic()
    status = subprocess.run(
        command, cwd=ROOT, check=False, env={**os.environ, **single, "PYTHONSAFEPATH": "1"}
    ).returncode
    record = read_junit(report) if report.exists() else {"passed": 0, "skipped": 0, "failures": {}}
    if status not in (0, NO_TESTS_COLLECTED) and not record["failures"]:
        record["failures"] = {marks: f"pytest ended with status {status}"}
    return {**record, "seconds": time.monotonic() - start}


def read_junit(path: Path) -> Record:
    """How many passed and were skipped, and the first line of what each other one says."""
    passed = skipped = 0
    failures = {}
    for case in xml.parse(path).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            why = (bad.get("message") or bad.text or "").strip().partition("\n")[0]
            failures.setdefault(name, why)  # a second time its worker was ended for it
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failures": failures}


def run_sanitizer(ops: list[str]) -> Record:
    """Each tool over each op's kernels at sizes that are no multiple of a tile, all at a time."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"ok": True, "skipped": "compute-sanitizer is not installed (a part of CUDA)"}
    asked = [(tool, op) for tool in TOOLS for op in ops]
    start = time.monotonic()
    with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        runs = list(pool.map(lambda pair: _sanitize(program, *pair), asked))
    return {
        "ok": all(run["ok"] for run in runs),
        "seconds": time.monotonic() - start,
        "runs": runs,
    }


def _sanitize(program: str, tool: str, op: str) -> Record:
    command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND_ERRORS)]
    # The compiler's own processes have no kernels.
    command += ["--target-processes", "application-only", "--print-limit", "20"]
    command += [sys.executable, "-P", "-m", smallest.__name__, op]
    # Blocks of torch's cache are one allocation to the tool: it would miss writes between them.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TOOL_SECONDS,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stuck:
        output = stuck.stdout or ""  # bytes on POSIX, whatever was asked for
        status, output = (
            None,
            output if isinstance(output, str) else output.decode(errors="replace"),
        )
    said = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "SUMMARY:" in line]
    run = {"tool": tool, "op": op, "ok": status == 0, "status": status, "summary": said[-1:]}
    run["seconds"] = time.monotonic() - start
    return run if run["ok"] else {**run, "output": output[:OUTPUT_CHARACTERS]}


def summary(part: str, record: Record) -> list[str]:
    """What a person reads of a part's record."""
    if part == "ceilings":
        return [
            f"bf16 product of 8192: {record['product_tflops']:.0f} TFLOP/s,"
            f" copy: {record['copy_tbytes_per_s']:.2f} TB/s"
        ]
    if part == "tests":
        failures = [f"  {name}: {why}" for name, why in record["failures"].items()]
        counts = f"{record['passed']} passed, {len(failures)} failed, {record['skipped']} skipped"
        return [f"GPU tests: {counts} in {record['seconds']:.0f} s", *failures]
    if "skipped" in record:
        return [f"sanitizer: {record['skipped']}"]
    lines = [
        f"  {run['tool']:9} {run['op']:22} {run['seconds']:4.0f} s  "
        + ("ok" if run["ok"] else f"status {run['status']} {' '.join(run['summary'])}")
        for run in record["runs"]
    ]
    return [f"sanitizer: {record['seconds']:.0f} s", *lines]
