import json
from itertools import islice

import pytest
import torch
from data.made_examples import Numbers, assert_same, ids, loader, streamed

from siglip2.data.loader import merge_states
from siglip2.errors import DataError


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True], ids=["read", "cached"])
def test_indexed_resume_is_exact(workers, cache):
    options = {"workers": workers, "cache_images": cache}
    source = Numbers(30, bad=(4, 7))
    whole = loader(source, **options)
    consumed = 5
    list(islice(whole, consumed))
    state = json.loads(json.dumps(whole.state_dict()))
    report = whole.report()
    rest = list(islice(whole, 6))
    fresh = loader(source, **options)
    fresh.load_state_dict(state)
    assert fresh.report() == report
    for expected, batch in zip(rest, fresh, strict=False):
        assert_same(expected, batch)
    assert fresh.report() == whole.report()
    whole.close(), fresh.close()


def test_workers_and_caching_change_no_batch():
    plain, workers, cached = (
        list(islice(loader(Numbers(20, bad=(3,)), **options), 8))
        for options in ({}, {"workers": 2}, {"cache_images": True})
    )
    for a, b, c in zip(plain, workers, cached, strict=True):
        assert_same(a, b)
        assert_same(a, c)


def test_workers_leave_the_training_process_its_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches = loader(Numbers(8), workers=1)
    next(batches)
    batches.close()
    assert torch.equal(torch.rand(3), expected)


def test_cached_images_are_read_once(monkeypatch):
    batches = loader(Numbers(30), batch_size=16, cache_images=True)
    list(islice(batches, 3))

    def read_again(self, i):
        raise AssertionError(f"example {i} was read twice")

    monkeypatch.setattr(Numbers, "__getitem__", read_again)
    assert len(set(ids(islice(batches, 6)))) == 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True], ids=["epochs", "resampled"])
@pytest.mark.parametrize("consumed", [1, 2, 9])
def test_streamed_resume_is_exact(shards, workers, resampled, consumed):
    def make():
        source = streamed(shards, resampled=resampled)
        return loader(source, workers=workers, shuffle_buffer=5)

    whole = make()
    list(islice(whole, consumed))
    state = json.loads(json.dumps(whole.state_dict()))
    rest = list(islice(whole, 5))
    fresh = make()
    fresh.load_state_dict(state)
    for expected, batch in zip(rest, fresh, strict=False):
        assert_same(expected, batch)
    assert fresh.report() == whole.report()
    whole.close(), fresh.close()


def test_a_state_of_another_run_is_refused(shards):
    state = loader(Numbers(8)).state_dict()
    with pytest.raises(DataError, match=r"cannot resume .* exactly: examples 8 -> 9"):
        loader(Numbers(9)).load_state_dict(state)
    with pytest.raises(DataError, match="keep_groups False -> True"):
        loader(Numbers(8), keep_groups=True).load_state_dict(state)
    state = loader(streamed(shards)).state_dict()
    with pytest.raises(DataError, match="seed 3 -> 1"):
        loader(streamed(shards), seed=1).load_state_dict(state)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 8), (4, 2), (1, 3)])
def test_another_number_of_ranks_goes_on_where_the_images_ended(world, batch_size):
    def ranks(world, batch_size):
        make = lambda rank: loader(Numbers(30), rank=rank, world_size=world, batch_size=batch_size)
        return [make(rank) for rank in range(world)]

    def seen(loaders, steps):
        return [i for _ in range(steps) for one in loaders for i in ids(islice(one, 1))]

    before = ranks(2, 4)
    seen(before, 3)
    states = [json.loads(json.dumps(one.state_dict())) for one in before]
    after = ranks(world, batch_size)
    for one in after:
        one.load_state_dict(merge_states(states))
    expected = seen(before, 3)
    assert seen(after, 24 // (world * batch_size)) == expected
    # a second stop, now at a place that is no multiple of the batch
    again = ranks(2, 4)
    for one in again:
        one.load_state_dict(merge_states([one.state_dict() for one in after]))
    assert seen(again, 1) == seen(before, 1)


def test_each_rank_of_streamed_shards_gets_its_own_readers_back(shards):
    def ranks():
        make = lambda rank: loader(streamed(shards), rank=rank, world_size=2, shuffle_buffer=5)
        return [make(rank) for rank in range(2)]

    whole = ranks()
    next(whole[0])
    list(islice(whole[1], 2))
    state = merge_states([one.state_dict() for one in whole])
    for number, (one, fresh) in enumerate(zip(whole, ranks(), strict=True)):
        fresh.load_state_dict({**state, "batches": 1 + number})
        assert_same(next(one), next(fresh))


def test_streamed_shards_over_other_readers_go_on_with_a_new_epoch(shards, caplog):
    whole = loader(streamed(shards), workers=2, shuffle_buffer=5)
    list(islice(whole, 3))
    state = whole.state_dict()
    whole.close()
    fresh = loader(streamed(shards), shuffle_buffer=5)
    first = next(loader(streamed(shards), shuffle_buffer=5))
    fresh.load_state_dict(state)
    assert ids([next(fresh)]) != ids([first])
    assert "read by 2 readers, now by 1: going on with a new epoch" in caplog.text
