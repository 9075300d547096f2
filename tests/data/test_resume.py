import json
from itertools import islice

import pytest
import torch
from data.made_examples import Numbers, assert_same, ids, loader, streamed

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
    with pytest.raises(
        DataError, match=r"cannot resume .* exactly: batch_size 4 -> 2, world_size 1 -> 2"
    ):
        loader(Numbers(8), batch_size=2, world_size=2).load_state_dict(state)
    with pytest.raises(DataError, match="keep_groups False -> True"):
        loader(Numbers(8), keep_groups=True).load_state_dict(state)
    state = loader(streamed(shards), workers=2).state_dict()
    with pytest.raises(DataError, match="readers 2 -> 1"):
        loader(streamed(shards)).load_state_dict(state)
