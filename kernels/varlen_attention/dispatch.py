"""Which backends run on a GPU when none is asked for, and why: one a pass.

Hopper's rules are measured on an H100 (the table is in README.md) and hold for later GPUs until
those are; Ampere's are arithmetic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Layout


class Rule(NamedTuple):
    majors: tuple[int, ...]  # of the compute capability; empty: every other one
    is_equal: bool  # speaks only of sequences of one length
    lengths: tuple[int, int | None]  # least and most of the longest sequence; None: any
    forward: str
    backward: str
    reason: str


_BACKWARD_OF_SHORT = "ours is deterministic and, up to 512 tokens, no slower than FlashAttention 2"
_BACKWARD_OF_LONG = "FlashAttention 2 makes gradients 1.2 times as fast at 1,024 tokens"
# The first rule that fits decides.
RULES = (
    Rule(
        (8,),
        False,
        (0, 64),
        "triton",
        "triton",
        "one tile holds a sequence: the backward reads and writes each tensor once",
    ),
    Rule(
        (8,),
        False,
        (0, None),
        "varlen_attn",
        "varlen_attn",
        "the backward's loop has to take small tiles for want of registers, and FlashAttention 2"
        " was written for this generation",
    ),
    Rule(
        (),
        True,
        (128, 512),
        "cudnn",
        "triton",
        f"cuDNN's forward is 1.2 to 1.5 times as fast; {_BACKWARD_OF_SHORT}",
    ),
    Rule(
        (),
        True,
        (513, None),
        "cudnn",
        "varlen_attn",
        f"cuDNN's forward is 1.4 times as fast; {_BACKWARD_OF_LONG}",
    ),
    Rule(
        (),
        False,
        (0, 512),
        "triton",
        "triton",
        f"ours has the fastest forward; {_BACKWARD_OF_SHORT}",
    ),
    Rule(
        (),
        False,
        (513, None),
        "triton",
        "varlen_attn",
        f"ours has the fastest forward where lengths differ; {_BACKWARD_OF_LONG}",
    ),
)


def rule(capability: tuple[int, int], longest: int, is_equal: bool) -> Rule:
    for candidate in RULES:
        least, most = candidate.lengths
        if (
            (not candidate.majors or capability[0] in candidate.majors)
            and (is_equal or not candidate.is_equal)
            and least <= longest
            and (most is None or longest <= most)
        ):
            return candidate
    raise AssertionError("the last rules fit everything")


class Passes(NamedTuple):
    forward: str
    backward: str


def preferred(q: Tensor, layout: Layout) -> Passes:
    """The backends to try first for queries (T, H, E) on their own device.

    Off CUDA (CPU tensors under Triton's interpreter) it is "triton"; float32 has no other.
    """
    if not q.is_cuda or q.dtype is torch.float32:
        return Passes("triton", "triton")
    longest = max(layout.max_seqlen, layout.max_seqlen_k)
    found = rule(torch.cuda.get_device_capability(q.device), longest, layout.is_equal)
    return Passes(found.forward, found.backward)
