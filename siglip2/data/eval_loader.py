"""One ordered pass over a source, for evaluation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from siglip2.data.images import Transform
from siglip2.data.regions import Region
from siglip2.data.skipped import Skipped
from siglip2.data.sources import Source, iterate
from siglip2.data.types import BadSampleError, Example, PackedImages
from siglip2.errors import DataError


class EvalBatch(NamedTuple):
    image: Tensor | PackedImages  # float (B, 3, H, W) in [-1, 1], or packed uint8
    captions: list[dict[str, str]]  # language -> caption
    groups: list[str]
    subsets: list[str]
    keys: list[str]
    indices: list[int]  # place among the good examples
    regions: list[tuple[Region, ...]]


class EvalLoader:
    """One ordered pass over a source each time it is iterated; bad examples are counted.

    `workers` threads decode (Pillow releases the interpreter's lock). Raises DataError if no
    example can be used.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        max_images: int | None = None,
        workers: int = 0,
    ):
        self.source, self.transform = source, transform
        self.batch_size, self.max_images, self.workers = batch_size, max_images, workers
        self._skipped = Skipped(source.name)

    def report(self) -> dict[str, int]:
        """Examples the last pass skipped, by reason."""
        return dict(self._skipped.counts)

    def _prepare(self, item: Example | BadSampleError) -> Any:
        if isinstance(item, BadSampleError):
            return item
        try:
            return item, self.transform.prepare(item.image)
        except BadSampleError as error:
            return BadSampleError(error.reason, item.key)

    def _good(self) -> Iterator[tuple[Example, Any]]:
        pool = ThreadPoolExecutor(self.workers) if self.workers else None
        items = iterate(self.source)
        try:
            while chunk := list(islice(items, self.batch_size)):
                done = pool.map(self._prepare, chunk) if pool else map(self._prepare, chunk)
                for found in done:
                    if isinstance(found, BadSampleError):
                        self._skipped.add([found])
                    else:
                        yield found
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[EvalBatch]:
        self._skipped = Skipped(self.source.name)
        batch: list[tuple[Example, Any]] = []
        seen = 0
        for found in self._good():
            batch.append(found)
            seen += 1
            if len(batch) == self.batch_size or seen == self.max_images:
                yield self._collate(batch, seen)
                batch = []
            if seen == self.max_images:
                return
        if batch:
            yield self._collate(batch, seen)
        if not seen:
            reasons = ", ".join(sorted(self._skipped.counts)) or "it is empty"
            raise DataError(f"no example of {self.source.name!r} can be used: {reasons}")

    def _collate(self, batch: list[tuple[Example, Any]], seen: int) -> EvalBatch:
        examples = [example for example, _ in batch]
        return EvalBatch(
            image=self.transform.finish(self.transform.stack([image for _, image in batch])),
            captions=[dict(example.captions) for example in examples],
            groups=[example.group for example in examples],
            subsets=[example.subset for example in examples],
            keys=[example.key for example in examples],
            indices=list(range(seen - len(batch), seen)),
            regions=[example.regions for example in examples],
        )
