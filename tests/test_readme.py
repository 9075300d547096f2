"""What the README shows runs as it stands, and its table is the one in bench/results."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_examples_run(code, capsys):
    exec(compile(code, str(README), "exec"), {"__name__": "example"})
    assert "nan" not in capsys.readouterr().out


def test_commands_exist():
    from siglip2.cli import COMMANDS

    used = set(re.findall(r"^siglip2 (\w+)", README.read_text(), flags=re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)
