"""Where numbers were measured: device, clocks, versions, commit, and the device's best rates."""

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import siglip2

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # of the checkout, where there is one


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Datasheet rates, dense (without structured sparsity)."""

    tensor_tflops: float  # bf16 and fp16
    fp32_tflops: float  # outside tensor cores
    tbytes_per_s: float


# NVIDIA's datasheets; the first pattern that matches the device's name counts.
PEAKS = (
    (r"H100 PCIe", Peak(tensor_tflops=756, fp32_tflops=51, tbytes_per_s=2.0)),
    (r"H100 NVL", Peak(tensor_tflops=835, fp32_tflops=60, tbytes_per_s=3.9)),
    (r"H100", Peak(tensor_tflops=989, fp32_tflops=67, tbytes_per_s=3.35)),
    (r"H200 NVL", Peak(tensor_tflops=835, fp32_tflops=60, tbytes_per_s=4.8)),
    (r"(?<!G)H200", Peak(tensor_tflops=989, fp32_tflops=67, tbytes_per_s=4.8)),
    (r"A100.*80GB", Peak(tensor_tflops=312, fp32_tflops=19.5, tbytes_per_s=2.0)),
    (r"A100", Peak(tensor_tflops=312, fp32_tflops=19.5, tbytes_per_s=1.555)),
    (r"(?<!G)B200", Peak(tensor_tflops=2250, fp32_tflops=75, tbytes_per_s=8.0)),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything a number needs beside it."""

    device: str  # "cuda" or "cpu"
    name: str  # GPU or CPU model
    torch: str
    triton: str  # "" without triton
    python: str
    siglip2: str
    driver: str = ""  # NVIDIA driver
    clocks: str = ""  # SM clock now and at most, power limit
    threads: int = 0  # CPU threads torch uses

    @property
    def slug(self) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return name if self.device == "cuda" else f"cpu-{name}"

    @property
    def software(self) -> tuple[str, ...]:
        """What must agree for two measurements to stand in one table."""
        return (self.name, self.torch, self.triton, self.driver)

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)

    def describe(self) -> str:
        parts = [self.name, f"torch {self.torch}"]
        parts += [f"triton {self.triton}"] if self.triton else []
        parts += [f"driver {self.driver}"] if self.driver else []
        parts += [self.clocks] if self.clocks else []
        parts += [f"{self.threads} threads"] if self.device == "cpu" else []
        return ", ".join([*parts, f"siglip2 {self.siglip2}"])


def this_machine(device: str) -> Machine:
    is_cuda = device == "cuda"
    driver, clocks = _nvidia_smi() if is_cuda else ("", "")
    return Machine(
        device=device,
        name=torch.cuda.get_device_name() if is_cuda else _cpu_model(),
        torch=torch.__version__,
        triton=_version("triton"),
        python=platform.python_version(),
        siglip2=siglip2.__version__,
        driver=driver,
        clocks=clocks,
        threads=torch.get_num_threads(),
    )


def peak_of(name: str) -> Peak | None:
    """Datasheet rates of a GPU by the name its driver gives; None for an unknown one."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def memory_bytes(device: str) -> int:
    """What the device has in all, used or not."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@cache
def git_commit() -> str:
    """Short commit of the checkout, with '+' when files differ from it; '' outside a checkout."""
    if not (ROOT / ".git").exists():
        return ""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + "+" if commit and changed else commit


def source_digest() -> str:
    """Hash of the code that measurements depend on; equal digests mean equal code."""
    import siglip2_kernels

    digest = hashlib.sha256()
    folders = [Path(siglip2_kernels.__file__).resolve().parent, PACKAGE, ROOT / "csrc"]
    for folder in folders:
        files = (p for p in folder.rglob("*") if p.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"})
        for path in sorted(files):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def results_dir() -> Path:
    """bench/results of a checkout; ./bench-results when installed elsewhere."""
    return PACKAGE / "results" if (ROOT / "pyproject.toml").exists() else Path("bench-results")


def _nvidia_smi() -> tuple[str, str]:
    fields = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    index = str(torch.cuda.current_device())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        index = visible.split(",")[int(index)].strip()
    line = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={index}")
    if line.count(",") != 3:
        return "", ""
    driver, clock, max_clock, power = (part.strip() for part in line.split(","))
    return driver, f"SM {clock} of {max_clock}, limit {power}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints, or '' when it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
