"""The examples run as their README says, and what they print is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name: str, *options: str, ranks: int = 1) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launch if ranks > 1 else []), str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # torchrun itself remarks on OMP_NUM_THREADS.
    noise = [x for x in done.stderr.splitlines() if "Warning" in x and "OMP_NUM_THREADS" not in x]
    assert not noise
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+ loss ([\d.]+)", printed, re.MULTILINE)]


def test_plain_loop_learns():
    first, *_, last = losses(output_of("plain_loop.py"))
    assert last < first / 2


@pytest.mark.dist
def test_ddp_and_fsdp2_take_the_same_steps():
    curves = [losses(output_of(name, ranks=2)) for name in ("ddp.py", "fsdp2.py")]
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0] / 2


def test_gradcache_equals_the_step_with_everything_in_memory():
    printed = output_of("gradcache.py")
    plain, cached = re.search(r"plain ([\d.]+) cached ([\d.]+)", printed).groups()
    assert plain == cached
    assert float(re.search(r"gradient difference (\S+)", printed).group(1)) < 1e-5
    first, *_, last = losses(printed)
    assert last < first / 2


def test_transformers_trainer_learns():
    pytest.importorskip("accelerate")
    found = [
        float(x) for x in re.findall(r"'loss': '?([\d.]+)", output_of("transformers_trainer.py"))
    ]
    assert found[-1] < found[0]


def test_every_example_is_in_the_readme():
    text = (EXAMPLES / "README.md").read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"two_towers.py"}
    assert {name for name in scripts if name in text} == scripts
