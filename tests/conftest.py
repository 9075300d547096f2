"""Seeds, poisoned uninitialised memory, and tiers: what this machine cannot run says so."""

import os
import random
import time

import numpy as np
import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# cuBLAS is deterministic only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tier -> marker; tests without one of them are the reference tier.
TIERS = {
    "interpreter": "interpreter",
    "compile": "aot",
    "gpu": "gpu",
    "dist": "dist",
}


def _unavailable(marker: str) -> str | None:
    """Why tests of this marker cannot run in this process."""
    if marker == "interpreter" and not INTERPRET:
        return "TRITON_INTERPRET=1 is not set"
    if marker == "gpu" and not torch.cuda.is_available():
        return "no CUDA device"
    if marker in ("gpu", "aot") and INTERPRET:
        return "TRITON_INTERPRET=1 is set"
    if marker in ("interpreter", "aot") and not _has("triton"):
        return "triton is not installed"
    if marker == "dist" and not torch.distributed.is_available():
        return "torch has no distributed package"
    return None


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def pytest_configure(config):
    config.addinivalue_line("markers", "aot: compiles Triton kernels for GPUs that are not here")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in TIERS.values():
            if item.get_closest_marker(marker) and (reason := _unavailable(marker)):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_terminal_summary(terminalreporter):
    ran: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            tiers = [tier for tier, marker in TIERS.items() if marker in report.keywords]
            for tier in tiers or ["reference"]:
                ran[tier] = ran.get(tier, 0) + 1
    words = []
    for tier, marker in {"reference": "", **TIERS}.items():
        if tier in ran:
            words.append(f"{tier} yes ({ran[tier]})")
        else:
            words.append(f"{tier} no ({_unavailable(marker) or 'none selected'})")
    terminalreporter.write_line("tiers: " + ", ".join(words))


@pytest.fixture(autouse=True)
def _give_device_memory_back():
    """Several workers share a GPU; what one keeps for its next test the others cannot have."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


_failed_here: set[str] = set()  # tests of this process


def pytest_runtest_logreport(report):
    if report.failed:
        _failed_here.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """A kernel that read out of bounds ends CUDA for its process: pytest-xdist starts another one.

    Else all later tests of this worker would fail for the one that broke it.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and nodeid in _failed_here and _cuda_has_ended():
        time.sleep(1)  # for the report to leave
        os._exit(1)


def _cuda_has_ended() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """torch.empty returns NaN, so a value that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
