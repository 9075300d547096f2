"""Where each sequence lies in a packed (T, D) tensor; made once a batch, shared by every layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siglip2_kernels import VarlenPlan, make_plan, uniform_plan


class Sequences(NamedTuple):
    """Bounds of packed sequences, and what attention kernels derive from them.

    No single length is a Python number here: a compiled tower serves any mix of them.
    """

    cu_seqlens: Tensor  # (B+1,) int32, device
    max_seqlen: int  # at least the longest; a power of two unless all are equal
    plan: VarlenPlan

    @property
    def last(self) -> Tensor:  # (B,) row of each sequence's last token
        return self.cu_seqlens[1:].long() - 1


class Kept(NamedTuple):
    """Tokens that are needed after the last block of a tower, which then makes no others."""

    index: Tensor  # (S,) int64 rows of (T, D); those of a sequence follow one another
    plan: VarlenPlan  # queries: the kept tokens; keys: all tokens of their sequence


def kept(
    index: Tensor,  # (S,) int64
    lengths: Sequence[int],  # (B,) kept tokens of each sequence
    lengths_k: Sequence[int],  # (B,) all tokens of each sequence
) -> Kept:
    """Raises ValueError when there is not one number of kept tokens for each sequence."""
    return Kept(index, make_plan(lengths, lengths_k, device=index.device))


def uniform(num: int, length: int, device: torch.device) -> Sequences:
    """`num` sequences of one length. Nothing is copied from the host."""
    plan = uniform_plan(num, length, device)
    return Sequences(plan.cu_seqlens, plan.max_seqlen, plan)


def ragged(lengths: Sequence[int], device: torch.device) -> Sequences:
    """Sequences of any lengths, zero included. The copy to the device is not waited for."""
    if len(set(lengths)) <= 1:
        return uniform(len(lengths), lengths[0] if lengths else 0, device)
    plan = make_plan(lengths, device=device)
    return Sequences(plan.cu_seqlens, plan.max_seqlen, plan)
