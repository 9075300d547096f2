"""Rivals out of a folder of wheels, for machines that reach no package registry."""

import importlib
import lzma
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from siglip2.errors import ConfigError

from .case import Case


def install(wheels: Path, target: Path) -> None:
    """Unpacks every wheel of a folder into `target`, and puts that last on the path.

    A wheel that was too large to carry may be stored whole and compressed, as NAME.whl.xz.
    Last: what the machine has already is what its PyTorch was built with.  `site` also follows the
    .pth files that some packages are found by.

    Raises:
        ConfigError: The folder has no wheel, or pip refuses one.
    """
    files = [*wheels.glob("*.whl"), *_decompressed(wheels, target.with_name("whole"))]
    if not files:
        raise ConfigError(f"need a folder of .whl files; got {wheels}, which has none")
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
    command += map(str, sorted(files))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"need wheels that pip installs here; {wheels}: {why}")
    site.addsitedir(str(target))
    importlib.invalidate_caches()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), str(target)])


def _decompressed(wheels: Path, folder: Path) -> list[Path]:
    files = []
    for path in wheels.glob("*.whl.xz"):
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / path.stem)
        with lzma.open(path) as packed, files[-1].open("wb") as whole:
            shutil.copyfileobj(packed, whole)
    return files


def rivals(cases: Iterable[Case], device: str) -> str:
    """A line of the packages that rivals come from, with versions, and one of those missing."""
    needed = {r.module: r for case in cases for r in case.rivals.values() if r.module is not None}
    present, absent = [], []
    for module, rival in needed.items():
        package = rival.pip or module
        reason = rival.unsupported(device)
        if reason is None:
            present.append(f"{package} {_version(package)}".strip())
        else:
            absent.append(f"{package}: {reason}")
    lines = [f"rivals here: {', '.join(present) or 'none'}"]
    return "\n".join([*lines, *(f"rivals that are not: {'; '.join(absent)}" for _ in absent[:1])])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
