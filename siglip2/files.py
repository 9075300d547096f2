"""Files that are never half written."""

import os
from pathlib import Path


def write_atomic(path: str | Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
