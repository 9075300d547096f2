"""Which design runs on a GPU when no backend is asked for, and why.

"triton" sweeps prototypes as attention sweeps keys and stores no logit; "chunked" has the library
multiply and takes eager passes over a chunk of float32 logits. Reasons are modelled, not measured.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    dtype: torch.dtype
    max_D: int | None  # widest bottleneck it speaks of; None: any
    backend: str
    reason: str


# A row's whole sum over prototypes stays in registers: 64 rows of 512 float32 numbers are half of
# a multiprocessor's.
MAX_D = 512
# The first rule that fits decides.
RULES = (
    Rule(
        torch.float32,
        None,
        "chunked",
        "products without tensor cores take nearly all the time, and the library's are faster",
    ),
    Rule(
        torch.bfloat16,
        MAX_D,
        "triton",
        "no logit through memory, where eager passes move some 130 bytes for each pair of them",
    ),
    Rule(
        torch.float16,
        MAX_D,
        "triton",
        "no logit through memory, where eager passes move some 130 bytes for each pair of them",
    ),
)


def rule(dtype: torch.dtype, D: int) -> Rule | None:
    """None where only one design takes the input."""
    for candidate in RULES:
        if dtype is candidate.dtype and (candidate.max_D is None or candidate.max_D >= D):
            return candidate
    return None


def preferred(x: Tensor) -> str:
    """The design to try first for (T, D) like `x`; off CUDA (the interpreter) it is "triton"."""
    found = rule(x.dtype, x.shape[1]) if x.is_cuda else None
    return found.backend if found else "triton"
