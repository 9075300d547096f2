"""Rows that cross ranks: uneven all-gather with its gradient, over torch.distributed."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 renames both and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_counts(
    counts: tuple[int, ...], device: torch.device, group: dist.ProcessGroup | None
) -> list[tuple[int, ...]]:
    """Each rank's `counts`, in rank order. Waits for the device: collectives need host sizes."""
    local = torch.tensor(counts, device=device)
    found = torch.empty(dist.get_world_size(group) * len(counts), dtype=local.dtype, device=device)
    _all_gather(found, local, group=group)
    return [tuple(row) for row in found.view(-1, len(counts)).tolist()]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        longest = max(sizes)
        padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - x.shape[0])).contiguous()
        out = x.new_empty(len(sizes) * longest, *x.shape[1:])
        _all_gather(out, padded, group=group)
        return torch.cat([block[:n] for block, n in zip(out.split(longest), sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        # float32 on the wire: a sum over many ranks in bf16 loses what the kernel kept.
        longest = max(ctx.sizes)
        tail = (0, 0) * (dout.ndim - 1)
        blocks = [F.pad(b, (*tail, 0, longest - b.shape[0])) for b in dout.float().split(ctx.sizes)]
        rank = dist.get_rank(ctx.group)
        dx = dout.new_empty(longest, *dout.shape[1:], dtype=torch.float32)
        _reduce_scatter(dx, torch.cat(blocks), group=ctx.group)
        return dx[: ctx.sizes[rank]].to(dout.dtype), None, None


def gather_rows(
    x: Tensor,  # (n, ...)
    sizes: list[int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # (sum(sizes), ...)
    """All ranks' rows in rank order; `sizes` says how many each has.

    The gradient is the sum over ranks of what each sends back.
    """
    return _GatherRows.apply(x, sizes, group) if max(sizes) else x


def check_same(what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Compare a shape and dtype over all ranks with one small collective.

    Raises ValueError on every rank when they differ, where later collectives would hang or mix
    rows.
    """
    mine = torch.tensor(
        [len(shape), *shape, *(-1,) * (7 - len(shape)), _code(dtype)], device=device
    )
    all_ranks = torch.empty(dist.get_world_size() * len(mine), dtype=mine.dtype, device=device)
    _all_gather(all_ranks, mine)
    rows = all_ranks.view(-1, len(mine))
    if bool((rows != rows[0]).any()):
        found = sorted({tuple(row[1 : 1 + row[0]].tolist()) for row in rows.cpu()})
        raise ValueError(f"ranks disagree on {what}: need one shape and dtype, got shapes {found}")


def _code(dtype: torch.dtype) -> int:
    return sum(ord(c) << (i % 8) for i, c in enumerate(str(dtype)))
