"""Walls of the project.

Who may import whom, how an op folder looks, what hot paths may not call.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(p.parent for p in (ROOT / "kernels").glob("*/op.py"))

# Folder -> what of ours it may import. An arrow that is not here does not exist.
ARROWS = {
    "siglip2/config": (),
    "siglip2/errors": (),
    "siglip2/files": (),
    "siglip2/distributed": (),
    "siglip2/gather": ("siglip2.distributed",),
    "siglip2/ring": ("siglip2.distributed",),
    "siglip2/losses": ("siglip2_kernels", "siglip2.distributed", "siglip2.gather", "siglip2.ring"),
    # data.types holds tuples only: the boundary between a collator and a model
    "siglip2/models": (
        "siglip2_kernels",
        "siglip2.models",
        "siglip2.config",
        "siglip2.errors",
        "siglip2.data.types",
        "siglip2.data.images",
    ),
    "siglip2/locca": (
        "siglip2_kernels",
        "siglip2.locca",
        "siglip2.models",
        "siglip2.data",
        "siglip2.errors",
    ),
    "siglip2/self_distillation": (
        "siglip2_kernels",
        "siglip2.self_distillation",
        "siglip2.models",
        "siglip2.distributed",
    ),
    "siglip2/recipe": (
        "siglip2_kernels",
        "siglip2.recipe",
        "siglip2.models",
        "siglip2.config",
        "siglip2.errors",
    ),
    "siglip2/data": ("siglip2.data", "siglip2.config", "siglip2.errors"),
    "siglip2/eval": (
        "siglip2.eval",
        "siglip2.locca",
        "siglip2.models",
        "siglip2.data",
        "siglip2.config",
        "siglip2.errors",
        "siglip2.files",
    ),
    "siglip2/train": ("siglip2_kernels", "siglip2"),
    "bench": ("siglip2_kernels", "siglip2", "siglip2_bench"),
    "kernels": ("siglip2_kernels",),
}
LIMITS = {"op.py": 200, "_triton.py": 400, "reference.py": 80}
MAX_LINES = 300
MAX_FUNCTION = 60

# Waits for the device, or copies to the host, inside a step.
SYNCS = re.compile(r"\.(item|tolist|cpu)\(|\bnonzero\(")
# Where sizes become host numbers, once a batch, and where weights are read and written; eager
# backends that loop over sequences or grids, whose sizes they take on the host only.
HOST_BOUNDARIES = (
    "_core/varlen.py",
    "posemb_resample/",
    "map_pool/reference.py",
    "varlen_attention/reference.py",
    "models/inputs.py",
    "models/weights/",
    "models/factory.py",
)


def sources(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ("kernels", "bench") else "/".join(parts[:2])


def imports_of(path: Path) -> set[str]:
    """Dotted names of ours that a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    package = (
        (f"siglip2_{package[0]}", *package[1:]) if package[0] in ("kernels", "bench") else package
    )
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module or "").split("."))).strip(".")
            found.add(name)
            found |= {f"{name}.{alias.name}" for alias in node.names if not node.module}
    return {name for name in found if name.split(".")[0].startswith("siglip2")}


@pytest.mark.parametrize(
    "path", sources("kernels", "siglip2", "bench"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_follow_the_arrows(path):
    allowed = ARROWS.get(folder_of(path))
    if allowed is None:
        assert path.parent == ROOT / "siglip2", f"{path}: no arrow is defined for this folder"
        return
    wrong = [
        name
        for name in imports_of(path)
        if not any(name == a or name.startswith(f"{a}.") for a in allowed) and name != "siglip2"
    ]
    assert not wrong, f"{path} may import {allowed}; it imports {wrong}"


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
def test_an_op_has_its_anatomy(folder):
    name = folder.name
    for needed in ("__init__.py", "README.md", "reference.py", "op.py"):
        assert (folder / needed).is_file(), f"{folder} has no {needed}"
    assert (ROOT / "tests/kernels" / f"test_{name}.py").is_file()
    assert (ROOT / "bench/ops" / f"{name}.py").is_file()
    for path in folder.glob("_*.py"):
        if path.name != "__init__.py":
            backend = [
                n
                for n in imports_of(path)
                if n.endswith((".reference", ".op", "._triton", "._chunked"))
            ]
            assert not backend, f"{path.name} imports {backend}: backends know _core only"
    for path in folder.glob("*.py"):
        if path.name != "op.py":
            assert "torch.library" not in path.read_text(), f"only op.py registers; {path} does too"


def test_ops_do_not_import_one_another():
    for folder in OPS:
        others = {f"siglip2_kernels.{o.name}" for o in OPS if o != folder}
        for path in folder.glob("*.py"):
            assert not {n for n in imports_of(path) if n in others}, path


@pytest.mark.parametrize(
    "path", sources("kernels", "siglip2", "bench"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    limit = LIMITS.get(path.name, MAX_LINES)
    assert len(text.splitlines()) <= limit, f"over {limit} lines: split by concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            kernel = node.name.endswith("_kernel")
            size = node.end_lineno - node.lineno + 1
            assert size <= (120 if kernel else MAX_FUNCTION), f"{node.name} has {size} lines"


@pytest.mark.parametrize(
    "path",
    [*sources("kernels", "siglip2/models"), ROOT / "siglip2/train/step.py"],
    ids=lambda p: p.name,
)
def test_hot_paths_do_not_wait_for_the_device(path):
    if any(part in str(path) for part in HOST_BOUNDARIES):
        return
    calls = [line for line in path.read_text().splitlines() if SYNCS.search(line)]
    assert not calls, f"{path}: {calls}"


def test_marks_of_unfinished_work_name_an_issue():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b(?!.*#\d+)")
    this = Path(__file__).resolve()
    found = [
        f"{path}:{i}"
        for path in sources("kernels", "siglip2", "bench", "tests")
        if path.resolve() != this
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert not found


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_installed_is_called_kernels_or_bench():
    # transformers imports Hugging Face's package of that name
    code = (
        "import siglip2_kernels, siglip2_bench;"
        " print(siglip2_kernels.__file__, siglip2_bench.__file__)"
    )
    assert "kernels" in run_python(code)
    found = run_python(
        "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    )
    assert str(ROOT) not in found


OPTIONAL = [
    "triton",
    "transformers",
    "PIL",
    "webdataset",
    "tokenizers",
    "sentencepiece",
    "jsonargparse",
    "rich",
    "matplotlib",
    "yaml",
    "datasets",
    "emoji",
]


def test_import_is_lean():
    code = (
        "import sys, torch; before = set(sys.modules); import siglip2, siglip2_kernels;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        f"print(sorted(new & set({OPTIONAL!r})), len(set(sys.modules) - before))"
    )
    optional, _, count = run_python(code).strip().rpartition(" ")
    assert optional == "[]"
    assert int(count) < 80, "import siglip2 loads too much"


def test_works_without_optional_packages():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "import siglip2, torch\n"
        "model = siglip2.create_model('siglip2-tiny-patch8-32', text_length=8)\n"
        "task = siglip2.Siglip2Task(model)\n"
        "batch = {'image': torch.zeros(2, 3, 32, 32), 'text': torch.ones(2, 8).long()}\n"
        "loss = task(batch)[0]['loss']; loss.backward(); print(bool(torch.isfinite(loss)))"
    )
    assert run_python(code).strip() == "True"
