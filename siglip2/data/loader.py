"""Endless training batches that resume exactly."""

import os
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from siglip2.data.batches import Batcher, IndexedBatches, RawBatch, StreamedBatches
from siglip2.data.eval_loader import EvalBatch, EvalLoader
from siglip2.data.images import FixedTransform, Transform
from siglip2.data.skipped import Skipped, _log
from siglip2.data.sources import ShardSource, Source
from siglip2.errors import DataError

__all__ = ["EvalBatch", "EvalLoader", "TrainLoader"]


class TrainLoader:
    """Endless iterator of {"image", "text", "image_ids", "text_ids", "languages"}.

    image: float (B, 3, H, W) in [-1, 1], or PackedImages in uint8.  text: ids (B * C, L) with C =
    captions_per_image; the captions of image i are rows [i * C, (i + 1) * C).  Equal ids mark
    positives: examples of one group have one id, the same in every process.

    Batches are full and a function of (seed, rank, world_size, number), whatever `workers` is (for
    streamed shards they depend on it).  Bad examples are skipped and counted (`report`).

    Args:
        workers: Reader processes; 0 reads here. Streamed shards get no more readers than shards.
        shuffle_buffer: Encoded examples each reader of streamed shards holds.
        cache_images: Keep prepared images and token ids in memory; reads in this process.
        keep_groups: Images of one group (drawings of one thing) come in one batch.
        random_shift: Move each image by up to this share of its sides; fixed resolution only.

    Raises DataError: too few shards, a state of another run, or no example that can be used.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tokenizer: Any,
        *,
        batch_size: int,
        captions_per_image: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        shuffle_buffer: int = 10_000,
        cache_images: bool = False,
        keep_groups: bool = False,
        random_shift: float = 0.0,
    ):
        if min(batch_size, captions_per_image, world_size, shuffle_buffer) < 1 or workers < 0:
            raise DataError(
                "need batch_size, captions_per_image, shuffle_buffer >= 1 and workers >= 0; got "
                f"{batch_size}, {captions_per_image}, {shuffle_buffer}, {workers}"
            )
        if not 0 <= random_shift < 0.5 or (
            random_shift and not isinstance(transform, FixedTransform)
        ):
            raise DataError(
                "data.random_shift must be in [0, 0.5), and 0 for NaFlex models;"
                f" got {random_shift}"
            )
        self.source, self.transform = source, transform
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.shuffle_buffer, self.keep_groups = shuffle_buffer, keep_groups
        self.workers = _usable_workers(source, workers, world_size, cache_images)
        self._batcher = Batcher(
            transform,
            tokenizer,
            captions_per_image=captions_per_image,
            seed=seed,
            rank=rank,
            cache=cache_images,
            max_shift=random_shift,
        )
        self._indexed = None
        if not isinstance(source, ShardSource):
            self._indexed = IndexedBatches(
                source,
                self._batcher,
                batch_size=batch_size,
                world_size=world_size,
                keep_groups=keep_groups,
            )
        elif keep_groups:
            raise DataError(
                f"data.keep_groups needs a source whose examples are at hand; {source.name!r} "
                "is streamed"
            )
        self._batches: Iterator[RawBatch] | None = None
        self._number = 0  # batches consumed, not those prefetched
        self._cursors: dict[int, tuple[int, int]] = {}
        self._skipped = Skipped(source.name)

    @property
    def _readers(self) -> int:
        return max(self.workers, 1)

    def _start(self) -> Iterator[RawBatch]:
        if self.workers:
            # Silences tokenizers' warning that its threads do not survive a fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if self._indexed is not None:
            if not self.workers:
                return map(self._indexed.__getitem__, count(self._number))
            return self._read_ahead(self._indexed, sampler=count(self._number))
        batches = StreamedBatches(
            self.source,
            self._batcher,
            batch_size=self.batch_size,
            world_size=self.world_size,
            readers=self._readers,
            shuffle_buffer=self.shuffle_buffer,
            start=self._number,
            cursors=self._cursors,
        )
        if not self.workers:
            return iter(batches)
        return self._read_ahead(batches)

    def _read_ahead(self, batches: Dataset, **options: Any) -> Iterator[RawBatch]:
        # A generator of its own, or workers would draw their seeds from the training process's.
        return iter(
            DataLoader(
                batches,
                batch_size=None,
                num_workers=self.workers,
                generator=torch.Generator(),
                **options,
            )
        )

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            self._batches = self._start()
        raw = next(self._batches)
        self._skipped.add(raw.skipped)
        if raw.failure is not None:
            raise DataError(raw.failure)
        self._number += 1
        if raw.cursor is not None:
            reader, *cursor = raw.cursor
            self._cursors[reader] = tuple(cursor)
        return {
            "image": self.transform.finish(raw.image),
            "text": raw.text,
            "image_ids": raw.image_ids,
            "text_ids": raw.text_ids,
            "languages": raw.languages,
        }

    def report(self) -> dict[str, int]:
        """Examples skipped so far, by reason (of all workers of this rank)."""
        return dict(self._skipped.counts)

    def _identity(self) -> dict[str, Any]:
        found = {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }
        if self._indexed is not None:
            return {**found, "examples": len(self.source), "keep_groups": self.keep_groups}
        return {**found, "shards": len(self.source.shards), "readers": self._readers}

    def state_dict(self) -> dict[str, Any]:
        """What a fresh loader needs to go on after the last batch that was consumed."""
        return {
            **self._identity(),
            "batches": self._number,
            "cursors": {str(k): list(v) for k, v in self._cursors.items()},
            "skipped": self.report(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises DataError if it belongs to a different run."""
        mine = self._identity()
        other = {key: state.get(key) for key in mine if state.get(key) != mine[key]}
        if other:
            changed = ", ".join(f"{k} {v} -> {mine[k]}" for k, v in other.items())
            raise DataError(
                f"cannot resume the data of {self.source.name!r} exactly: {changed}. Use the "
                "values the run started with, or start afresh from its weights (model.pretrained)."
            )
        self.close()
        self._number = state["batches"]
        self._cursors = {int(k): tuple(v) for k, v in state["cursors"].items()}
        self._skipped.counts.clear()
        self._skipped.counts.update(state["skipped"])

    def close(self) -> None:
        """End the reader processes; the next batch starts them again."""
        self._batches = None


def _usable_workers(source: Source, workers: int, world_size: int, cache_images: bool) -> int:
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
