"""How many patches each NaFlex image of a batch may have: a function of the batch's number.

SigLIP 2 (section 2.4.2) draws one sequence length a mini-batch, uniformly. Mixed batches draw one
an image; every rank gets as many images, since the sigmoid loss pairs all with all, and about as
much work. Any rank can tell every rank's share, so nothing is exchanged.
"""

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np

from siglip2.errors import DataError

Mode = Literal["batch", "mixed"]
_SIZES, _PLACES = range(2)  # random streams that share a seed


class Budgets:
    """Budgets of the images of any batch of any rank.

    Args:
        sizes: Patches an image may have; each as likely as the others.
        mode: "batch": one size for all images of a batch on all ranks. "mixed": one for each.
        batch_size: Images a rank and batch.
        max_tokens: Most patches a rank computes at a time. A "mixed" batch stays below it: where
            it does not, the largest images get the next smaller size. Of a "batch" of larger
            images `parts` are computed one after the other.
        attention_tokens: Tokens of a sequence whose attention costs as much as its other products.

    Raises DataError: no sizes, one below 1, or `max_tokens` below what the smallest takes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        mode: Mode,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        max_tokens: int | None = None,
        attention_tokens: float = 4608.0,
    ):
        if not sizes or min(sizes) < 1:
            raise DataError(f"need patch budgets of at least 1; got {tuple(sizes)}")
        least = min(sizes) * (batch_size if mode == "mixed" else 1)
        if max_tokens is not None and max_tokens < least:
            of = f"{batch_size} images of {min(sizes)}" if mode == "mixed" else "the smallest image"
            raise DataError(f"need data.max_tokens of at least {least}, {of}; got {max_tokens}")
        self.sizes = np.unique(np.asarray(sizes, dtype=np.int64))
        self.mode, self.batch_size, self.world_size = mode, batch_size, world_size
        self.seed, self.max_tokens, self.attention_tokens = seed, max_tokens, attention_tokens

    @property
    def largest(self) -> int:
        return int(self.sizes[-1])

    def of_rank(self, number: int, rank: int) -> np.ndarray:  # (B,)
        """Patches each of this rank's images of batch `number` may have, in their order."""
        sizes = self.sizes[np.repeat(np.arange(len(self.sizes)), self._deal(number)[rank])]
        rng = np.random.default_rng([_PLACES, self.seed, number, rank])
        return rng.permutation(sizes)

    def parts(self, number: int) -> int:
        """In how many parts each rank computes batch `number`; at most one image each."""
        if self.max_tokens is None or self.mode == "mixed":
            return 1
        tokens = int(self._deal(number)[0] @ self.sizes)
        return min(-(-tokens // self.max_tokens), self.batch_size)

    def balance(self, number: int) -> float:
        """Work of the rank that has most over the mean; 1 is even."""
        work = self._deal(number) @ self._work()
        return float(work.max() / work.mean())

    def _work(self) -> np.ndarray:  # (S,) of one image of each size: a T + b n^2, in units of a
        return self.sizes * (1 + self.sizes / self.attention_tokens)

    def _deal(self, number: int) -> np.ndarray:  # (W, S): how many images of each size
        """Every rank's share of the sizes drawn for a batch."""
        W, B, S = self.world_size, self.batch_size, len(self.sizes)
        rng = np.random.default_rng([_SIZES, self.seed, number])
        if self.mode == "batch":
            shares = np.zeros((W, S), dtype=np.int64)
            shares[:, rng.integers(S)] = B
            return shares
        drawn = rng.multinomial(W * B, np.full(S, 1 / S))
        shares = np.tile(drawn // W, (W, 1))
        self._deal_rest(shares, drawn % W)
        return shares if self.max_tokens is None else self._lowered(shares)

    def _deal_rest(self, shares: np.ndarray, rest: np.ndarray) -> None:
        """The fewer than W images left of each size, large ones first, to the least loaded rank."""
        work = self._work()
        heap = [(0.0, rank) for rank in range(self.world_size)]
        room = np.full(self.world_size, self.batch_size) - shares.sum(1)
        for size in reversed(range(len(self.sizes))):
            for _ in range(rest[size]):
                load, rank = heapq.heappop(heap)
                while not room[rank]:
                    load, rank = heapq.heappop(heap)
                shares[rank, size] += 1
                room[rank] -= 1
                heapq.heappush(heap, (load + work[size], rank))

    def _lowered(self, shares: np.ndarray) -> np.ndarray:
        """Each rank below `max_tokens`: the largest images move down one size at a time."""
        for size in reversed(range(1, len(self.sizes))):
            excess = shares @ self.sizes - self.max_tokens
            step = self.sizes[size] - self.sizes[size - 1]
            moved = np.clip(-(-excess // step), 0, shares[:, size])
            shares[:, size] -= moved
            shares[:, size - 1] += moved
        return shares


def attention_tokens(width: int, mlp_width: int) -> float:
    """Where n tokens' attention (4 n D FLOPs a token) costs what their products do.

    2 (4 D^2 + 2 D M) / (4 D) = 2 D + M: 4,608 for B/16.
    """
    return 2.0 * width + mlp_width
