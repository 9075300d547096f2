"""Which backend runs on a GPU when none is asked for, and why. One decision for both passes.

Bytes and FLOPs below are arithmetic; nothing of it is measured yet.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Layout


class Rule(NamedTuple):
    majors: tuple[int, ...]  # of the compute capability; empty: every other one
    max_length: int | None  # longest sequence it speaks of; None: any
    backend: str
    reason: str


# The first rule that fits decides.
RULES = (
    Rule(
        (8,),
        64,
        "triton",
        "one tile holds a sequence: the backward reads and writes each tensor once",
    ),
    Rule(
        (8,),
        None,
        "varlen_attn",
        "the backward's loop has to take small tiles for want of registers, and FlashAttention 2"
        " was written for this generation",
    ),
    Rule(
        (),
        512,
        "triton",
        "short sequences are bound by memory: the backward moves 1,008 bytes a token and head"
        " where FlashAttention's three kernels move 2,830 (head width 72)",
    ),
    Rule(
        (),
        None,
        "varlen_attn",
        "long sequences are bound by products, which FlashAttention issues faster",
    ),
)


def rule(capability: tuple[int, int], longest: int) -> Rule:
    for candidate in RULES:
        if (not candidate.majors or capability[0] in candidate.majors) and (
            candidate.max_length is None or candidate.max_length >= longest
        ):
            return candidate
    raise AssertionError("the last rule fits everything")


def preferred(q: Tensor, layout: Layout) -> str:
    """The backend to try first for queries (T, H, E) on their own device.

    Off CUDA (CPU tensors under Triton's interpreter) it is "triton"; float32 has no other.
    """
    if not q.is_cuda or q.dtype is torch.float32:
        return "triton"
    longest = max(layout.max_seqlen, layout.max_seqlen_k)
    return rule(torch.cuda.get_device_capability(q.device), longest).backend
