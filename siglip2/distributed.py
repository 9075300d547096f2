"""Rows and gradients that cross ranks, and what is said when a rank differs or does not answer."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 renames both and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# What gloo and NCCL say of a peer that died or never came; other errors pass as they are.
_LOST = re.compile(r"connection|timed out|timeout|broken pipe|closed|remote process|abort", re.I)
_DESCRIPTION_BYTES = 256
_MAX_LISTED = 8


class RankLostError(RuntimeError):
    """Another rank died or did not arrive."""


@contextmanager
def waiting_for(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Around a collective: a dead peer becomes a RankLostError that says who waited for what."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLostError):
            raise
        if not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        reason = str(error).strip().splitlines()[0]
        raise RankLostError(
            f"rank {dist.get_rank()} lost another rank while it waited for {what} over"
            f" {dist.get_world_size(group)} ranks. Look for the first error in the other ranks'"
            f" logs, then start all ranks again from the last checkpoint ({reason})"
        ) from error


def wait_for_all(what: str, timeout_s: float, group: dist.ProcessGroup | None = None) -> None:
    """Return once every rank of the group has called this; collectives are not used.

    Works with any backend and waits for no device: ranks meet in the store they were started with.

    Raises RankLostError that names the missing ranks, on every rank that came.
    """
    group = group or dist.group.WORLD
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    store = group.get_group_store()
    with waiting_for(what, group):  # the store's own process may be the one that died
        base = f"siglip2/{what}/{store.add(f'siglip2/{what}/calls/{rank}', 1)}"
        store.set(f"{base}/{rank}", "")
        if store.add(f"{base}/arrived", 1) == len(ranks):
            store.set(f"{base}/all", "")
        try:
            store.wait([f"{base}/all"], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            missing = [r for r in ranks if not store.check([f"{base}/{r}"])]
            if missing:
                raise RankLostError(
                    f"rank {rank} waited {timeout_s:g} s for {_ranks(missing)} at {what}. Look for"
                    " the first error in the logs of the missing, or for a step that only some"
                    " ranks take"
                ) from error


def _host_device(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Where to exchange host numbers: the CPU if the group's backend takes its tensors."""
    takes_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if takes_cpu else device


def gather_counts(
    counts: tuple[int, ...], device: torch.device, group: dist.ProcessGroup | None
) -> list[tuple[int, ...]]:
    """Each rank's `counts`, in rank order, as host numbers: collectives need host sizes.

    Waits for `device` only if the group's backend takes no CPU tensors; "cpu:gloo,cuda:nccl" does.
    """
    local = torch.tensor(counts, device=_host_device(device, group))
    found = local.new_empty(dist.get_world_size(group) * len(counts))
    with waiting_for("the numbers of rows", group):
        _all_gather(found, local, group=group)
    return [tuple(row) for row in found.view(-1, len(counts)).tolist()]


class Holdings(NamedTuple):
    """How many images and texts each rank of a group has, in rank order."""

    images: list[int]
    texts: list[int]
    rank: int  # this one, in the group

    @property
    def share(self) -> float:
        """Images a rank, on average."""
        return sum(self.images) / len(self.images)

    def image_positions(self, device: torch.device) -> Tensor:  # (B,) int64
        """Ids that pair image i with text i of all ranks."""
        return _positions(self.images, self.rank, device)

    def text_positions(self, rank: int, device: torch.device) -> Tensor:  # (M,) int64
        return _positions(self.texts, rank, device)


def _positions(sizes: list[int], rank: int, device: torch.device) -> Tensor:
    first = sum(sizes[:rank])
    return torch.arange(first, first + sizes[rank], device=device)


def gather_holdings(
    num_images: int,
    num_texts: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    *,
    is_paired: bool,
) -> Holdings:
    """Raises ValueError, on every rank, if rows are paired by position and their numbers differ."""
    counts = gather_counts((num_images, num_texts), device, group)
    images, texts = (list(column) for column in zip(*counts, strict=True))
    if is_paired and images != texts:
        raise ValueError(
            "need as many texts as images on each rank, or ids;"
            f" got {images} images and {texts} texts"
        )
    return Holdings(images, texts, dist.get_rank(group))


class PendingRows:
    """All ranks' rows in rank order, on their way since this was made. No gradient."""

    def __init__(
        self,
        x: Tensor,  # (n, ...)
        sizes: list[int],
        group: dist.ProcessGroup | None,
    ):
        self._sizes, self._group = sizes, group
        most = max(sizes)
        x = x.detach().contiguous()
        # Equal sizes travel as they are; the shorter of unequal ones are padded.
        self._sent = F.pad(x, (0, 0) * (x.ndim - 1) + (0, most - len(x))) if len(x) < most else x
        self._out = x.new_empty(len(sizes) * most, *x.shape[1:])
        with waiting_for("all ranks' texts", group):
            self._work = _all_gather(self._out, self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:  # (sum(sizes), ...)
        """Take the rows, once: nothing is held afterwards."""
        with waiting_for("all ranks' texts", self._group):
            self._work.wait()
        out, most = self._out, max(self._sizes)
        del self._out, self._sent, self._work
        if min(self._sizes) == most:
            return out
        return torch.cat([x[:n] for x, n in zip(out.split(most), self._sizes, strict=True)])


class PendingSum:
    """This rank's rows of a sum over ranks, on their way since this was made.

    The dtype of `rows` travels. The loss's gradients come in float32: a sum over many ranks in
    bfloat16 would lose what the kernel kept.
    """

    def __init__(
        self,
        rows: Tensor,  # (sum(sizes), D)
        factor: Tensor,  # (), this rank's, applied before the sum
        sizes: list[int],
        group: dist.ProcessGroup | None,
    ):
        self._group, most = group, max(sizes)
        if min(sizes) == most:
            self._sent = rows * factor
        else:
            self._sent = rows.new_zeros(len(sizes) * most, rows.shape[1])
            blocks = zip(rows.split(sizes), self._sent.split(most), sizes, strict=True)
            for block, padded, n in blocks:
                torch.mul(block, factor, out=padded[:n])
        self._num_rows = sizes[dist.get_rank(group)]
        self._out = rows.new_empty(most, rows.shape[1])
        with waiting_for("the gradients of its texts", group):
            self._work = _reduce_scatter(self._out, self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:  # (n, D)
        with waiting_for("the gradients of its texts", self._group):
            self._work.wait()
        return self._out[: self._num_rows]


def check_same(what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Compare a shape and dtype over all ranks; see `check_descriptions`."""
    check_descriptions(what, f"{tuple(shape)} {dtype}", device)


def check_descriptions(
    what: str, mine: str, device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Compare what each rank says it holds, with one collective of 256 bytes a rank.

    Raises ValueError on every rank when they differ, where later collectives would hang or mix
    rows.
    """
    data = mine.encode()[:_DESCRIPTION_BYTES].ljust(_DESCRIPTION_BYTES, b" ")
    local = torch.tensor(list(data), dtype=torch.uint8, device=_host_device(device, group))
    found = local.new_empty(dist.get_world_size(group) * len(data))
    with waiting_for(f"a comparison of {what}", group):
        _all_gather(found, local, group=group)
    holders: dict[str, list[int]] = {}
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    for rank, row in zip(ranks, found.view(len(ranks), -1).tolist(), strict=True):
        holders.setdefault(bytes(row).decode(errors="replace").strip(), []).append(rank)
    if len(holders) > 1:
        got = "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in holders.items())
        raise ValueError(f"ranks disagree on {what}: need the same on every rank; got {got}")


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:_MAX_LISTED]))
    more = f" and {len(ranks) - _MAX_LISTED} more" if len(ranks) > _MAX_LISTED else ""
    return f"rank{'s' * (len(ranks) > 1)} {listed}{more}"
