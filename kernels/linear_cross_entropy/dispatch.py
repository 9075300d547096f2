"""Which of the two GPU designs runs when no backend is asked for, and why.

"triton" makes exponentials in the epilogue of its own product and never stores a logit; "cublas"
lets the library make float32 logits and takes one kernel over them. The first is measured on an
H100 in bfloat16 (README); all comparisons are modelled from data sheets.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    dtype: torch.dtype
    max_D: int | None  # widest model it speaks of; None: any
    backend: str
    reason: str


# The first rule that fits decides.
RULES = (
    Rule(
        torch.float32,
        None,
        "cublas",
        "products without tensor cores take nearly all the time, and the library's are faster",
    ),
    Rule(
        torch.bfloat16,
        None,
        "triton",
        "measured on an H100: 56.6 against 109.6 ms at 32,768 tokens, 256,000 words and D = 768;"
        " 2 bytes a logit go through memory instead of 14",
    ),
    Rule(
        torch.float16,
        1152,
        "triton",
        "exponentials fit float16 once their sums are known: a second product of T V D costs less"
        " than float32 logits through memory",
    ),
    Rule(
        torch.float16,
        None,
        "cublas",
        "the second product that float16 asks for grows with D, the pass over logits does not",
    ),
)


def rule(dtype: torch.dtype, D: int) -> Rule | None:
    """None for a dtype that neither design takes."""
    for candidate in RULES:
        if dtype is candidate.dtype and (candidate.max_D is None or candidate.max_D >= D):
            return candidate
    return None


def preferred(x: Tensor) -> str:
    """The design to try first for (T, D) like `x`; off CUDA (the interpreter) it is "triton"."""
    found = rule(x.dtype, x.shape[1]) if x.is_cuda else None
    return found.backend if found else "triton"
