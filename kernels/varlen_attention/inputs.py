"""What attention in a pack accepts, and where its sequences lie."""

import torch
from torch import Tensor

from .plan import Layout, VarlenPlan, unsorted_plan


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless they are (T, H, E), (S, H, E), (S, H, E) of one dtype and device."""
    shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or 0 in q.shape[1:]:
        raise ValueError(f"need q (T, H, E), k and v (S, H, E); got {shapes}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"need q, k, v of one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        got = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"need q, k, v on one device; got {got}")


def layout_of(
    q: Tensor,  # (T, H, E)
    cu_seqlens: Tensor,  # (B+1,)
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,  # (B+1,)
    max_seqlen_k: int | None,
    plan: VarlenPlan | None,
    lookahead: Tensor | None = None,  # (B,)
) -> Layout:
    """Raises ValueError."""
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("need cu_seqlens_k and max_seqlen_k together, or neither; got one")
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    for name, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.ndim != 1 or cu.dtype is not torch.int32 or not cu.shape[0]:
            raise ValueError(f"need {name} (B+1,) int32; got {tuple(cu.shape)} {cu.dtype}")
        if cu.device != q.device:
            raise ValueError(f"need {name} on q's device, {q.device}; got {cu.device}")
    if cu_seqlens.shape != cu_seqlens_k.shape:
        got = f"{cu_seqlens.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        raise ValueError(f"need as many sequences of keys as of queries; got {got}")
    if plan is None:
        plan = unsorted_plan(cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    else:
        _check_plan(plan, cu_seqlens, max_seqlen, max_seqlen_k)
    if lookahead is not None:
        _check_lookahead(lookahead, cu_seqlens)
    rest = (plan.tiles, plan.order, plan.max_seqlen, plan.max_seqlen_k, plan.is_equal)
    return Layout(cu_seqlens, cu_seqlens_k, None, None, lookahead, *rest)


def _check_lookahead(lookahead: Tensor, cu_seqlens: Tensor) -> None:
    B, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    if lookahead.shape != (B,) or lookahead.dtype is not torch.int32 or lookahead.device != device:
        got = f"{tuple(lookahead.shape)} {lookahead.dtype} on {lookahead.device}"
        raise ValueError(f"need lookahead ({B},) int32 on {device}; got {got}")


def _check_plan(plan: VarlenPlan, cu_seqlens: Tensor, max_seqlen: int, max_seqlen_k: int) -> None:
    have = (plan.cu_seqlens.shape[0] - 1, plan.max_seqlen, plan.max_seqlen_k)
    need = (cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen_k)
    if have[0] != need[0] or have[1] < need[1] or have[2] < need[2]:
        raise ValueError(
            "need the plan of these sequences: (number, longest, longest of keys) "
            f"{need}; its own are {have}: call make_plan with their lengths"
        )
    if plan.tiles.device != cu_seqlens.device:
        raise ValueError(f"need plan on {cu_seqlens.device}; got {plan.tiles.device}")


def padded_layout(
    q: Tensor,  # (B, N, H, E)
    k: Tensor,  # (B, M, H, E)
    v: Tensor,  # (B, M, H, E)
    lengths: Tensor,  # (B,)
    lengths_k: Tensor | None,  # (B,)
) -> Layout:
    """Raises ValueError."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
        raise ValueError(f"need q (B, N, H, E), k and v (B, M, H, E); got {shapes}")
    (B, N), M = q.shape[:2], k.shape[1]
    if lengths_k is None:
        if M != N:
            raise ValueError(
                f"need lengths_k where keys have other rows than queries; got {M}, {N}"
            )
        lengths_k = lengths
    for name, x in (("lengths", lengths), ("lengths_k", lengths_k)):
        if x.shape != (B,) or x.dtype is not torch.int32 or x.device != q.device:
            got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"need {name} ({B},) int32 on {q.device}; got {got}")
    rows = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    cu, cu_k = rows * N, rows * M
    plan = unsorted_plan(cu, cu_k, N, M)
    return Layout(cu, cu_k, lengths, lengths_k, None, plan.tiles, plan.order, N, M)
