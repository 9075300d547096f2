"""Batches of streamed shards: each reader process shuffles its own through a buffer."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from siglip2.data.batches import BUFFER, SHARDS, Batcher, Prepared, RawBatch, all_bad, failed
from siglip2.data.skipped import _log
from siglip2.data.sources import ShardSource, Source
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError


class StreamedBatches(IterableDataset):
    """Batches of streamed shards: reader r of R takes every R-th of each epoch's shuffled shards.

    `start` is the number of the next batch, `cursors` say how far each of this rank's readers got;
    what an epoch already gave is replayed without decoding.
    """

    def __init__(
        self,
        source: ShardSource,
        batcher: Batcher,
        *,
        batch_size: int,
        world_size: int,
        readers: int,
        shuffle_buffer: int,
        start: int = 0,
        cursors: dict[int, tuple[int, int]] | None = None,
        first_epoch: int = 0,
    ):
        self.source, self.batcher = source, batcher
        self.batch_size, self.readers = batch_size, readers  # readers of this rank
        self.all_readers = world_size * readers
        self.shuffle_buffer = shuffle_buffer
        self.start, self.cursors = start, cursors or {}
        self.first_epoch = first_epoch

    def _shards(self, reader: int, epoch: int) -> Iterator[str]:
        shards, seed = self.source.shards, self.batcher.seed
        if not self.source.resampled:
            order = np.random.default_rng([SHARDS, seed, epoch]).permutation(len(shards))
            yield from (shards[i] for i in order[reader :: self.all_readers])
            return
        rng = np.random.default_rng([SHARDS, seed, epoch, reader])
        draws = -(-len(shards) // self.all_readers)
        while draws > 0 or self.source.train_num_samples is not None:
            yield shards[int(rng.integers(len(shards)))]
            draws -= 1

    def _read(self, reader: int, epoch: int) -> Iterator[Example | BadSampleError]:
        """One reader's epoch, shuffled through a buffer of encoded examples."""
        rng = np.random.default_rng([BUFFER, self.batcher.seed, epoch, reader])
        buffer: list[Example | BadSampleError] = []
        for shard in self._shards(reader, epoch):
            for item in self.source.read(shard):
                if len(buffer) < self.shuffle_buffer:
                    buffer.append(item)
                    continue
                at = int(rng.integers(len(buffer)))
                yield buffer[at]
                buffer[at] = item
        yield from (buffer[i] for i in rng.permutation(len(buffer)))

    def _epoch(self, reader: int, epoch: int, taken: int) -> Iterator[Example | BadSampleError]:
        limit = self.source.train_num_samples
        if limit is not None:
            limit = -(-limit // self.all_readers)
        return islice(self._read(reader, epoch), taken, limit)

    def __iter__(self) -> Iterator[RawBatch]:
        worker = get_worker_info()
        local = ((worker.id if worker else 0) + self.start) % self.readers
        number = self.start + (local - self.start) % self.readers
        reader = self.batcher.rank * self.readers + local
        epoch, taken = self.cursors.get(local, (self.first_epoch, 0))
        examples: list[Prepared] = []
        skipped: list[BadSampleError] = []
        good = taken > 0  # a replayed part was good enough once
        while True:
            for item in self._epoch(reader, epoch, taken):
                taken += 1
                try:
                    if isinstance(item, BadSampleError):
                        raise item
                    found = self.batcher.prepare(item)
                    examples.append(self.batcher.fit(found, number, len(examples)))
                    good = True
                except BadSampleError as error:
                    skipped.append(BadSampleError(error.reason, error.key))
                    continue
                if len(examples) == self.batch_size:
                    cursor = (local, epoch, taken)
                    yield self.batcher.batch(examples, number, skipped, cursor)
                    number += self.readers
                    examples, skipped = [], []
            if not good:
                yield failed(all_bad(self.source.name, taken, skipped), skipped)
                return
            epoch, taken, good = epoch + 1, 0, False


def usable_workers(source: Source, workers: int, world_size: int, cache_images: bool) -> int:
    """How many reader processes `source` keeps busy on each rank.  Raises DataError."""
    if not isinstance(source, ShardSource):
        return 0 if cache_images else workers
    if cache_images:
        raise DataError(
            f"data.cache_images needs a source that fits in memory; {source.name!r} is streamed"
        )
    shards = len(source.shards)
    readers = world_size * max(workers, 1)
    if source.resampled or readers <= shards:
        return workers
    said = (
        f"{shards} shards for {world_size} ranks x {max(workers, 1)} workers ({readers} readers of "
        f"{source.name!r})"
    )
    if shards < world_size:
        raise DataError(
            f"{said}: each rank needs a shard. Write more shards, use fewer ranks, or set "
            "data.resampled=true."
        )
    workers = shards // world_size
    _log.warning("%s: using data.workers=%d; data.resampled=true would use all", said, workers)
    return workers
