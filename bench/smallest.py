"""Every kernel once, forward and backward, at sizes that are no multiple of a tile.

For tools that look at each memory access and make a kernel a thousand times slower:

    compute-sanitizer --tool racecheck python3 -P -m siglip2_bench.smallest sigmoid_loss
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from . import ops
from .case import Case, Shape, make_inputs
from .check import value_and_grads

# Beside the shape at which the case is checked on a CPU: what other kernels than there take.
MORE: dict[str, tuple[Shape, ...]] = {
    "varlen_attention": (
        {"B": 3, "N": 130, "H": 1, "E": 64},  # several tiles a sequence
        {"B": 2, "N": 100, "H": 1, "E": 96},
    ),
    "map_pool": ({"B": 2, "N": 130, "D": 192},),  # several tiles of tokens, slices of columns
}


def names() -> list[str]:
    """Ops with kernels of ours; towers are made of those."""
    return [op for op in ops.names() if any(r.is_ours and r.needs_cuda for r in _rivals(op))]


def run(op: str, device: str) -> list[str]:
    """Runs what of `op` is ours on `device`, on a GPU its kernels; which providers that was."""
    case = ops.load(op)
    ran = []
    for shape in (case.check_shapes["cpu"], *MORE.get(op, ())):
        for dtype in case.dtypes:
            ran += _run(case, shape, dtype, device)
    return list(dict.fromkeys(ran))


def _run(case: Case, shape: Shape, dtype: torch.dtype, device: str) -> list[str]:
    inputs = make_inputs(case, shape, dtype=dtype, device=device)
    ours = {n: r for n, r in case.rivals.items() if r.is_ours and not r.unsupported(device)}
    if device == "cuda":  # some eager backends read lengths on the host
        ours = {n: r for n, r in ours.items() if r.needs_cuda}
    for name, rival in ours.items():
        # Each is a tensor: a NaN would come of memory that nobody wrote.
        for result in value_and_grads(rival.build(), inputs):
            if not bool(result.isfinite().all()):
                raise ArithmeticError(f"{name} at {dict(shape)} in {dtype}: not finite")
    return list(ours)


def _rivals(op: str):
    return ops.load(op).rivals.values()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(names())}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    for op in args.ops or names():
        print(f"{op}: {', '.join(run(op, args.device))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
