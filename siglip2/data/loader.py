"""Endless training batches that resume exactly."""

import os
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from siglip2.data.batches import Batcher, IndexedBatches, RawBatch, WriteTexts
from siglip2.data.budgets import Budgets
from siglip2.data.eval_loader import EvalBatch, EvalLoader
from siglip2.data.images import FixedTransform, NaflexTransform, Transform
from siglip2.data.skipped import Skipped, _log
from siglip2.data.sources import ShardSource, Source
from siglip2.data.streamed_batches import StreamedBatches, usable_workers
from siglip2.data.types import PackedImages
from siglip2.errors import DataError

__all__ = ["EvalBatch", "EvalLoader", "TrainLoader", "merge_states"]


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
        budgets: Patches each image may have (NaFlex); None: the transform's `max_num_patches`.
        write_texts: Makes each image's caption and regions, as the batch shows them, into an entry
            of "task_texts" (`siglip2.locca.TextDraws`).

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
        budgets: Budgets | None = None,
        write_texts: WriteTexts | None = None,
    ):
        if min(batch_size, captions_per_image, world_size, shuffle_buffer) < 1 or workers < 0:
            raise DataError(
                "need batch_size, captions_per_image, shuffle_buffer >= 1 and workers >= 0; got "
                f"{batch_size}, {captions_per_image}, {shuffle_buffer}, {workers}"
            )
        _check_options(transform, random_shift, budgets)
        self.source, self.transform, self.budgets = source, transform, budgets
        self._packed: dict[str, float] = {}
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.shuffle_buffer, self.keep_groups = shuffle_buffer, keep_groups
        self.workers = usable_workers(source, workers, world_size, cache_images)
        self._batcher = Batcher(
            transform,
            tokenizer,
            captions_per_image=captions_per_image,
            seed=seed,
            rank=rank,
            cache=cache_images,
            max_shift=random_shift,
            budgets=budgets,
            write_texts=write_texts,
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
        self._number = self._first_epoch = 0  # batches consumed, not those prefetched
        self._cursors: dict[int, tuple[int, int]] = {}  # readers of all ranks that are known of
        self._skipped = Skipped(source.name)

    @property
    def _readers(self) -> int:
        return max(self.workers, 1)

    @property
    def _first_reader(self) -> int:
        return self.rank * self._readers

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
            cursors={r - self._first_reader: at for r, at in self._cursors.items()},
            first_epoch=self._first_epoch,
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
        parts = self._note(raw)
        self._number += 1
        if raw.cursor is not None:
            reader, *cursor = raw.cursor
            self._cursors[self._first_reader + reader] = tuple(cursor)
        return {
            "image": self.transform.finish(raw.image),
            "text": raw.text,
            "image_ids": raw.image_ids,
            "text_ids": raw.text_ids,
            "languages": raw.languages,
            **parts,
            **({} if raw.task_texts is None else {"task_texts": raw.task_texts}),
        }

    def _note(self, raw: RawBatch) -> dict[str, int]:
        """Remembers how full the batch is; the parts it is to be computed in, if several."""
        if not isinstance(raw.image, PackedImages):
            return {}
        self._packed = {"data/tokens": float(raw.image.patches.shape[0])}
        if self.budgets is None:
            return {}
        self._packed["data/fill"] = self._packed["data/tokens"] / raw.allowed
        self._packed["data/balance"] = self.budgets.balance(self._number)
        parts = self.budgets.parts(self._number)
        return {"accum_steps": parts} if parts > 1 else {}

    def packing(self) -> dict[str, float]:
        """Of the last batch: its patches, their share of what the budgets allow, and the work of
        the rank that has most over the mean rank's. Empty for fixed sizes.
        """
        return dict(self._packed)

    def report(self) -> dict[str, int]:
        """Examples skipped so far, by reason (of all workers of this rank)."""
        return dict(self._skipped.counts)

    def _identity(self) -> dict[str, Any]:
        if self._indexed is not None:
            sizes = {"examples": len(self.source), "keep_groups": self.keep_groups}
        else:
            sizes = {"shards": len(self.source.shards)}
        return {"seed": self.seed, **sizes}

    def state_dict(self) -> dict[str, Any]:
        """What a fresh loader needs to go on after the last batch that was consumed.

        Of streamed shards each rank knows its own readers: `merge_states` joins all ranks' states.
        """
        state = {**self._identity(), "batches": self._number, "skipped": self.report()}
        if self._indexed is not None:
            return {**state, "place": self._indexed.place(self._number)}
        cursors = {str(k): list(v) for k, v in self._cursors.items()}
        return {**state, "readers": self._readers * self.world_size, "cursors": cursors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with any batch size and number of ranks.

        Streamed shards split over another number of readers go on with their next epoch, with a
        note. Raises DataError if `state` is of other data or another seed.
        """
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
        if self._indexed is not None:
            self._indexed.go_on(self._number, state["place"])
        else:
            self._load_cursors(state)
        self._skipped.counts.clear()
        self._skipped.counts.update(state["skipped"])

    def _load_cursors(self, state: dict[str, Any]) -> None:
        cursors = {int(k): tuple(v) for k, v in state["cursors"].items()}
        before, readers = state["readers"], self._readers * self.world_size
        mine = range(self._first_reader, self._first_reader + self._readers)
        self._cursors = {r: cursors[r] for r in mine if r in cursors}
        if before != readers:
            self._cursors = {}
            self._first_epoch = 1 + max((epoch for epoch, _ in cursors.values()), default=-1)
            _log.warning(
                "%s: its shards were read by %d readers, now by %d: going on with a new epoch",
                self.source.name,
                before,
                readers,
            )

    def close(self) -> None:
        """End the reader processes; the next batch starts them again."""
        self._batches = None


def _check_options(transform: Transform, random_shift: float, budgets: Budgets | None) -> None:
    if not 0 <= random_shift < 0.5 or (random_shift and not isinstance(transform, FixedTransform)):
        raise DataError(
            f"data.random_shift must be in [0, 0.5), and 0 for NaFlex models; got {random_shift}"
        )
    if budgets is not None and not isinstance(transform, NaflexTransform):
        raise DataError("data.patch_budgets are for NaFlex models; this one has a fixed size")


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of all ranks' `state_dict`s, rank 0's first."""
    merged = dict(states[0])
    if "cursors" in merged:
        merged["cursors"] = {k: at for state in states for k, at in state["cursors"].items()}
    return merged
