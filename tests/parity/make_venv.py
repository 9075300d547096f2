"""Create the environment of the parity tier: the base environment plus torchvision, timm and
open_clip.

timm and open_clip need torchvision, which must stay out of the base environment (its operators do
not load beside a CPU torch, and transformers then fails too). The new environment reads everything
else from the base one.

    python tests/parity/make_venv.py [FOLDER]        # default: .venv-parity in the repository
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PACKAGES = [
    "torchvision==0.28.0",
    "timm>=1.0.31",
    "open_clip_torch>=3.3",
    "ftfy",
    "regex",
    "wcwidth",
]
REPOSITORY = Path(__file__).resolve().parents[2]


def make_venv(folder: Path) -> Path:
    """Build (or complete) the environment and return its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=True)
    base = sysconfig.get_path("purelib")
    (site,) = folder.glob("lib/python*/site-packages")
    # addsitedir, not a bare path: the base environment's own .pth files (editable installs) must
    # run too.
    (site / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    return python


if __name__ == "__main__":
    print(make_venv(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / ".venv-parity"))
