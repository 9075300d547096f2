import logging
from itertools import islice

import pytest
from data.made_examples import ids, loader, streamed

from siglip2.data.batches import stable_id
from siglip2.errors import DataError


def test_a_streamed_epoch_has_each_good_example_once(shards):
    found = ids(islice(loader(streamed(shards, samples=1000), shuffle_buffer=5), 12))
    good = {stable_id(f"{shard}{i}") for shard in range(4) for i in range(7) if i != 3}
    assert set(found[:24]) == good
    assert set(found[24:]) == good
    assert found[:24] != found[24:]


def test_train_num_samples_bounds_a_streamed_epoch(shards):
    batches = loader(streamed(shards, samples=12), shuffle_buffer=1000)
    epochs = []
    for _ in range(9):
        next(batches)
        epoch, taken = batches.state_dict()["cursors"]["0"]
        epochs.append(epoch)
        assert taken <= 12
    # 12 samples, some of them bad, are three batches of 4 at most.
    assert max(map(epochs.count, epochs)) <= 3
    assert epochs[-1] >= 2


def test_ranks_read_different_shards(shards):
    ranks = [loader(streamed(shards), rank=r, world_size=2, shuffle_buffer=5) for r in range(2)]
    first, second = (set(ids(islice(rank, 3))) for rank in ranks)
    assert not first & second
    assert len(first | second) == 24


def test_too_few_shards(shards, caplog):
    source = streamed(shards)
    with caplog.at_level(logging.WARNING, "siglip2"):
        assert loader(source, workers=4, world_size=2).workers == 2
    assert "4 shards for 2 ranks x 4 workers (8 readers of" in caplog.text
    assert "using data.workers=2; data.resampled=true would use all" in caplog.text
    message = r"4 shards for 5 ranks x 1 workers \(5 readers .* or set data.resampled=true"
    with pytest.raises(DataError, match=message):
        loader(source, world_size=5)
    assert loader(streamed(shards, resampled=True), workers=3, world_size=5).workers == 3


def test_streamed_bad_examples_reach_the_main_process(shards):
    batches = loader(streamed(shards), workers=2, shuffle_buffer=5)
    list(islice(batches, 8))  # both workers are in their second epoch
    assert 4 <= batches.report()["cannot decode image"] <= 8
    batches.close()
