"""Which of the two GPU designs runs when no backend is asked for, and why.

"triton" makes logits and G in one kernel; its product is slower than the library's, more so the
wider the embedding. "cublas" lets the library make every product and pays one pass over a chunk of
logits in memory, whatever the width. Hopper's reason is measured, the others are modelled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


class Rule(NamedTuple):
    majors: tuple[int, ...]  # of the compute capability; empty: every other one
    dtypes: tuple[torch.dtype, ...]
    backend: str
    reason: str


# The first rule that fits decides.
RULES = (
    Rule(
        (),
        (torch.float32,),
        "cublas",
        "products without tensor cores take nearly all the time, and the library's are faster",
    ),
    Rule(
        (9,),
        _HALF,
        "triton",
        "measured on an H100, bf16: 34.1 against 38.2 ms at 65,536 pairs and D = 768, 11.3 against"
        " 12.2 at 32,768 and D = 1,152; and logits stay float32",
    ),
    Rule(
        (10,),
        _HALF,
        "cublas",
        "products are twice as fast as Hopper's and memory too, the epilogue is not",
    ),
    Rule(
        (),
        _HALF,
        "triton",
        "several blocks share a multiprocessor, so epilogues hide behind products;"
        " memory is slow beside both",
    ),
)


def rule(capability: tuple[int, int], dtype: torch.dtype) -> Rule | None:
    """None for a dtype that neither design takes."""
    for candidate in RULES:
        is_device = not candidate.majors or capability[0] in candidate.majors
        if is_device and dtype in candidate.dtypes:
            return candidate
    return None


def preferred(img: Tensor) -> str:
    """The design to try first for embeddings like `img` (B, D) on their own device.

    Off CUDA (CPU tensors under Triton's interpreter) it is "triton".
    """
    if not img.is_cuda:
        return "triton"
    found = rule(torch.cuda.get_device_capability(img.device), img.dtype)
    return found.backend if found else "triton"
