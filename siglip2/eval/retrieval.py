"""Exact image-text retrieval: recall at k in both directions, for groups of any size.

An image and a text are positives of one another when they share a group. A query's rank is the
number of negatives that score at least as high as its best positive, so a tie counts against the
model:

    rank(q) = #{ j negative : s(q, j) >= max_{p positive} s(q, p) - eps }
    R@k     = mean_q [rank(q) < k]

eps = sqrt(D) * 2^-23 is the rounding of a float32 dot product of unit vectors. Without it a model
that maps everything to one point would be ranked by where the matrix product cut its tiles; with
it its recall is 0.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

Groups = Sequence[str | Collection[str]]  # an item's group, or its groups


class Recall(NamedTuple):
    """Fractions of queries with a positive among their first k; `chance` is a random ranking's."""

    i2t: dict[int, float]  # k -> recall, images as queries
    t2i: dict[int, float]  # k -> recall, texts as queries
    chance_i2t: dict[int, float]
    chance_t2i: dict[int, float]
    num_images: int
    num_texts: int


class Ranks(NamedTuple):
    rank: Tensor  # (N,) int64: negatives at least as good as the best positive
    num_positives: Tensor  # (N,) int64


class _Membership(NamedTuple):
    """Which groups each query has, and which items each group has, as two ragged tables."""

    query_start: Tensor  # (N+1,) int64
    query_groups: Tensor  # groups of query i: [start[i], start[i+1])
    group_start: Tensor  # (G+1,) int64
    group_items: Tensor

    def positives(
        self, start: int, stop: int, num_items: int
    ) -> Tensor:  # (stop - start, num_items) bool
        low, high = self.query_start[start], self.query_start[stop]
        groups = self.query_groups[low:high]
        owner = torch.repeat_interleave(self.query_start[start : stop + 1].diff())
        first, count = self.group_start[groups], self.group_start.diff()[groups]
        pair = torch.repeat_interleave(count)
        within = torch.arange(len(pair), device=pair.device) - (count.cumsum(0) - count)[pair]
        mask = torch.zeros(stop - start, num_items, dtype=torch.bool, device=pair.device)
        mask[owner[pair], self.group_items[first[pair] + within]] = True
        return mask


def _names(group: str | Collection[str]) -> Collection[str]:
    return (group,) if isinstance(group, str) else set(group)


def _membership(queries: Groups, items: Groups, device: torch.device) -> _Membership:
    ids: dict[str, int] = {}
    members: list[list[int]] = []
    for index, group in enumerate(items):
        for name in _names(group):
            if name not in ids:
                ids[name] = len(members)
                members.append([])
            members[ids[name]].append(index)
    owned = [[ids[name] for name in _names(group) if name in ids] for group in queries]

    def ragged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([0] + [len(row) for row in rows], device=device)
        flat = torch.tensor([x for row in rows for x in row], dtype=torch.int64, device=device)
        return lengths.cumsum(0), flat

    return _Membership(*ragged(owned), *ragged(members))


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products of float32 in float32: TF32 keeps 10 bits, too few to order neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_finite(
    z: Tensor,  # (N, D)
    what: str,
) -> None:
    """Raise ValueError, naming the first row of `z` that holds a NaN or an infinity."""
    bad = ~torch.isfinite(z).all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"need finite {what} embeddings; {int(bad.sum())} of {len(z)} hold NaN or infinity, the"
            f" first is number {int(bad.int().argmax())}. The model has diverged: take an earlier"
            " checkpoint"
        )


def ranks(
    query: Tensor,  # (N, D) unit rows
    item: Tensor,  # (M, D) unit rows
    query_groups: Groups,
    item_groups: Groups,
    *,
    chunk_size: int = 4096,
) -> Ranks:
    """Rank of each query's best positive, 0 being the best; see the module for ties.

    Scores are float32, `chunk_size` rows of them are held at a time: O(chunk_size * M) memory.
    Raises ValueError for a query without a positive.
    """
    query, item = query.float(), item.float()
    membership = _membership(query_groups, item_groups, query.device)
    eps = math.sqrt(query.shape[1]) * 2.0**-23
    rank, num_positives = [], []
    with _full_float32():
        for start in range(0, len(query), chunk_size):
            stop = min(start + chunk_size, len(query))
            positive = membership.positives(start, stop, len(item))
            score = query[start:stop] @ item.T  # (chunk, M)
            best = score.masked_fill(~positive, -math.inf).amax(1, keepdim=True)
            rank.append(((score >= best - eps) & ~positive).sum(1))
            num_positives.append(positive.sum(1))
    counts = torch.cat(num_positives)
    if bool((counts == 0).any()):
        index = int((counts == 0).int().argmax())
        raise ValueError(
            f"need a positive for every query; number {index} (group {query_groups[index]!r})"
            " shares its group with none. Leave such queries out"
        )
    return Ranks(torch.cat(rank), counts)


def chance_recall(
    num_positives: Tensor,  # (N,)
    num_items: int,
    k: int,
) -> float:
    """Recall at k of a random order: 1 - C(M - P, k) / C(M, k), averaged over queries."""
    total = 0.0
    values, counts = num_positives.unique(return_counts=True)
    for P, count in zip(values.tolist(), counts.tolist(), strict=True):
        miss = math.comb(num_items - P, k) / math.comb(num_items, k) if k <= num_items else 0.0
        total += count * (1.0 - miss)
    return total / len(num_positives)


def retrieval_recall(
    img: Tensor,  # (N, D) unit rows
    txt: Tensor,  # (M, D) unit rows
    img_groups: Groups,
    txt_groups: Groups,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 4096,
) -> Recall:
    """Recall at each k, images to texts and back; a hit is any item of one of the query's groups.

    Args:
        img_groups, txt_groups: N and M groups. An item may have several: a caption that two
            concepts share should be one text with both groups, since as two texts each would be
            the other's hard negative.

    Exact, float32, O(chunk_size * max(N, M)) memory. Raises ValueError for embeddings that are not
    finite, for lengths that disagree and for a query without a positive.
    """
    if (
        img.ndim != 2
        or txt.ndim != 2
        or img.shape[1] != txt.shape[1]
        or not len(img)
        or not len(txt)
    ):
        raise ValueError(
            f"need img (N, D), txt (M, D), none empty; got {tuple(img.shape)}, {tuple(txt.shape)}"
        )
    if (len(img), len(txt)) != (len(img_groups), len(txt_groups)):
        raise ValueError(
            f"need one group entry an embedding; got {len(img)} images with {len(img_groups)},"
            f" {len(txt)} texts with {len(txt_groups)}"
        )
    check_finite(img, "image")
    check_finite(txt, "text")
    i2t = ranks(img, txt, img_groups, txt_groups, chunk_size=chunk_size)
    t2i = ranks(txt, img, txt_groups, img_groups, chunk_size=chunk_size)
    return Recall(
        i2t={k: float((i2t.rank < k).double().mean()) for k in ks},
        t2i={k: float((t2i.rank < k).double().mean()) for k in ks},
        chance_i2t={k: chance_recall(i2t.num_positives, len(txt), k) for k in ks},
        chance_t2i={k: chance_recall(t2i.num_positives, len(img), k) for k in ks},
        num_images=len(img),
        num_texts=len(txt),
    )
