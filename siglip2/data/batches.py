"""Which examples and captions make batch k: functions of the seed, so that any process can tell."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from siglip2.data.augment import random_shift
from siglip2.data.budgets import Budgets
from siglip2.data.captions import base_language
from siglip2.data.images import Decoded, Transform
from siglip2.data.regions import Region
from siglip2.data.sources import IndexedSource
from siglip2.data.types import BadSampleError, Example, PackedImages

# Distinguish the random streams that share a seed.
_ORDER, _CAPTIONS, SHARDS, BUFFER, _CANVAS = range(5)


def stable_id(group: str) -> int:
    """63-bit hash that is the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") >> 1


class Prepared(NamedTuple):
    """An example after decoding and resizing."""

    image: Tensor | Decoded  # uint8; not yet resized where each drawing of it is another
    captions: tuple[tuple[str, str], ...]  # (language, text)
    group_id: int
    tokens: dict[str, Tensor]  # language -> ids, filled as they are drawn where batches are cached
    regions: tuple[Region, ...] = ()


class RawBatch(NamedTuple):
    """A batch as a reader process sends it: images in uint8, and what was skipped on the way."""

    image: Tensor | PackedImages | None
    text: Tensor | None  # (B * captions_per_image, L)
    image_ids: Tensor | None
    text_ids: Tensor | None
    languages: list[str]
    skipped: list[BadSampleError]
    cursor: tuple[int, int, int] | None = None  # reader, epoch, examples taken of it
    failure: str | None = None  # why there is no batch
    allowed: int = 0  # patches its budgets allow
    task_texts: list | None = None  # what `Batcher.write_texts` wrote for each image


# Caption, regions and the batch's generator to what a captioning decoder is asked.
WriteTexts = Callable[[str, Sequence[Region], np.random.Generator], Any]


class Batcher:
    """Prepares examples and joins them, with captions drawn by the batch's own generator."""

    def __init__(
        self,
        transform: Transform,
        tokenizer: Any,
        *,
        captions_per_image: int,
        seed: int,
        rank: int,
        cache: bool,
        max_shift: float = 0.0,
        budgets: Budgets | None = None,
        write_texts: WriteTexts | None = None,
    ):
        self.transform, self.tokenizer = transform, tokenizer
        self.write_texts = write_texts
        self.max_shift = max_shift  # of the sides of an image
        self.captions_per_image = captions_per_image
        self.seed, self.rank, self.cache = seed, rank, cache
        self.budgets = budgets
        self._sizes_of: tuple[int, np.ndarray] | None = None  # of the batch in hand
        # Whether an image is resized anew each time it is drawn.
        self.is_fitted_late = budgets is not None or getattr(transform, "canvas_aspect", 1) > 1

    def prepare(self, example: Example) -> Prepared:
        prepare = self.transform.decode if self.is_fitted_late else self.transform.prepare
        try:
            image = prepare(example.image)
        except BadSampleError as error:
            raise BadSampleError(error.reason, example.key) from None
        captions = tuple(example.captions.items())
        return Prepared(image, captions, stable_id(example.group), {}, tuple(example.regions))

    def fit(self, found: Prepared, number: int, place: int) -> Prepared:
        """`found` as image `place` of batch `number` shows it."""
        if not self.is_fitted_late:
            return found
        size = None if self.budgets is None else int(self._sizes(number)[place])
        rng = np.random.default_rng([_CANVAS, self.seed, self.rank, number, place])
        fitted = self.transform.fit(found.image, size, rng)
        return found._replace(image=fitted.pixels, regions=fitted.place.move(found.regions))

    def _sizes(self, number: int) -> np.ndarray:  # (B,)
        if self._sizes_of is None or self._sizes_of[0] != number:
            self._sizes_of = number, self.budgets.of_rank(number, self.rank)
        return self._sizes_of[1]

    def _tokens(self, drawn: list[tuple[Prepared, int]]) -> Tensor:  # (M, L)
        if not self.cache:
            return self.tokenizer([p.captions[i][1] for p, i in drawn])
        missing = {}
        for p, i in drawn:
            language, text = p.captions[i]
            if language not in p.tokens:
                missing[text] = None
        if missing:
            new = dict(zip(missing, self.tokenizer(list(missing)), strict=True))
            for p, i in drawn:
                language, text = p.captions[i]
                if text in new:
                    p.tokens.setdefault(language, new[text])
        return torch.stack([p.tokens[p.captions[i][0]] for p, i in drawn])

    def batch(
        self,
        examples: list[Prepared],
        number: int,
        skipped: list[BadSampleError],
        cursor: tuple[int, int, int] | None = None,
    ) -> RawBatch:
        rng = np.random.default_rng([_CAPTIONS, self.seed, self.rank, number])
        C = self.captions_per_image
        drawn = []
        for example in examples:
            n = len(example.captions)
            # Without replacement; an example with fewer captions repeats them.
            order = [0] * C if n == 1 else np.resize(rng.permutation(n), C).tolist()
            drawn += [(example, i) for i in order]
        image_ids = torch.tensor([example.group_id for example in examples])
        image = self.transform.stack([example.image for example in examples])
        regions = [example.regions for example in examples]
        if self.max_shift:
            image, places = random_shift(image, self.max_shift, rng)
            regions = [place.move(these) for place, these in zip(places, regions, strict=True)]
        return RawBatch(
            image=image,
            text=self._tokens(drawn),
            image_ids=image_ids,
            text_ids=image_ids.repeat_interleave(C),
            languages=[base_language(p.captions[i][0]) for p, i in drawn],
            skipped=skipped,
            cursor=cursor,
            allowed=0 if self.budgets is None else int(self._sizes(number).sum()),
            task_texts=self._task_texts(drawn[::C], regions, rng),
        )

    def _task_texts(
        self,
        drawn: list[tuple[Prepared, int]],  # of each image, its first caption
        regions: list[tuple[Region, ...]],
        rng: np.random.Generator,
    ) -> list | None:
        if self.write_texts is None:
            return None
        captions = [example.captions[i][1] for example, i in drawn]
        return [self.write_texts(*said, rng) for said in zip(captions, regions, strict=True)]


def failed(reason: str, skipped: list[BadSampleError]) -> RawBatch:
    return RawBatch(None, None, None, None, [], skipped, failure=reason)


def all_bad(name: str, count: int, skipped: list[BadSampleError]) -> str:
    reasons = sorted({error.reason for error in skipped})
    return f"none of the {count} examples of {name!r} can be used: {', '.join(reasons)}"


def _members_of_groups(source: IndexedSource) -> list[list[int]]:
    """Numbers of each group's examples; one that cannot be read is a group by itself."""
    members: dict[str | int, list[int]] = {}
    for index in range(len(source)):
        try:
            members.setdefault(source[index].group, []).append(index)
        except BadSampleError:
            members[index] = [index]
    return list(members.values())


class IndexedBatches(Dataset):
    """Batch k of a rank holds places [(k * W + rank) * B, + B) of endless shuffled epochs.

    After `go_on` these count from the place where an earlier run stopped, whatever its W and B.
    A bad example is replaced by the next good one half an epoch further on, so that batch k does
    not depend on what was read before it.  With `keep_groups` an epoch is shuffled by groups, whose
    examples stay neighbours; finding the groups reads every example once.
    """

    def __init__(
        self,
        source: IndexedSource,
        batcher: Batcher,
        *,
        batch_size: int,
        world_size: int,
        keep_groups: bool = False,
    ):
        self.source, self.batcher = source, batcher
        self.batch_size, self.world_size = batch_size, world_size
        self._groups = _members_of_groups(source) if keep_groups else None
        self._base = (0, 0)  # a batch's number and its first place, over all ranks
        self._orders: dict[int, np.ndarray] = {}
        self._known: dict[int, Prepared | BadSampleError] = {}

    def place(self, number: int) -> int:
        """The first place of batch `number` over all ranks."""
        base, place = self._base
        return place + (number - base) * self.world_size * self.batch_size

    def go_on(self, number: int, place: int) -> None:
        self._base = (number, place)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            rng = np.random.default_rng([_ORDER, self.batcher.seed, epoch])
            if self._groups is None:
                self._orders[epoch] = rng.permutation(len(self.source))
            else:
                shuffled = rng.permutation(len(self._groups))
                self._orders[epoch] = np.concatenate([self._groups[g] for g in shuffled])
        return self._orders[epoch]

    def _prepared(self, index: int) -> Prepared | BadSampleError:
        if index in self._known:
            return self._known[index]
        try:
            found = self.batcher.prepare(self.source[index])
        except BadSampleError as error:
            found = BadSampleError(error.reason, error.key)  # drops the traceback and its frames
        if self.batcher.cache or isinstance(found, BadSampleError):
            self._known[index] = found
        return found

    def _candidates(self, place: int) -> Iterator[int]:
        N = len(self.source)
        epoch, at = divmod(place, N)
        order = self._order(epoch)
        yield int(order[at])
        for step in range(N):
            yield int(order[(at + N // 2 + step) % N])

    def __getitem__(self, number: int) -> RawBatch:
        first = self.place(number) + self.batcher.rank * self.batch_size
        examples: list[Prepared] = []
        skipped: list[BadSampleError] = []
        for place in range(first, first + self.batch_size):
            for index in self._candidates(place):
                found = self._prepared(index)
                if isinstance(found, Prepared):
                    examples.append(self.batcher.fit(found, number, len(examples)))
                    break
                skipped.append(found)
            else:
                return failed(all_bad(self.source.name, len(self.source), skipped), skipped)
        return self.batcher.batch(examples, number, skipped)
