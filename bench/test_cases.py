"""The cases under pytest-benchmark: `pytest bench --benchmark-only [--benchmark-compare]`.

On a CPU the smoke shape alone.  Rivals are not checked here: `siglip2 bench` does that.
"""

import pytest
import torch

from siglip2_bench import ops
from siglip2_bench.case import Case, make_inputs
from siglip2_bench.machine import memory_bytes
from siglip2_bench.runner import call_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {op: ops.load(op) for op in ops.names()}


def _shapes(case: Case) -> list[dict[str, int]]:
    return [dict(shape) for shape in (case.shapes[1:] if DEVICE == "cuda" else case.shapes[:1])]


PARAMETERS = [
    pytest.param(op, name, shape, id="-".join([op, name, *(f"{k}{v}" for k, v in shape.items())]))
    for op, case in CASES.items()
    for name in case.rivals
    for shape in _shapes(case)
]


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize(("op", "name", "shape"), PARAMETERS)
def test_case(op, name, shape, mode, benchmark):
    case = CASES[op]
    reason = case.rivals[name].unsupported(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    dtype = case.dtypes[0] if DEVICE == "cuda" else torch.float32
    reason = case.rivals[name].too_large(mode, shape, dtype, memory_bytes(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    inputs = make_inputs(case, shape, dtype=dtype, device=DEVICE)
    benchmark.group = f"{op} {mode} {shape}"
    torch.compiler.reset()
    try:
        with call_of(case.rivals[name].build(), inputs, mode)() as call:
            call()  # compiles and tunes

            def synchronised() -> None:
                call()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()

            benchmark(synchronised)
    except NotImplementedError as unsupported:
        pytest.skip(str(unsupported))
