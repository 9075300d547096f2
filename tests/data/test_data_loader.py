import json
import logging
import subprocess
import sys
from itertools import islice

import pytest
import torch
from data.made_files import pair, picture, write_tar

from siglip2.config import DataConfig
from siglip2.data.batches import stable_id
from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.data.loader import EvalLoader, TrainLoader
from siglip2.data.sources import IndexedSource, open_source
from siglip2.data.train_tokenizer import train_tokenizer
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError

LANGUAGES = ("en", "de", "fr")
TOKENIZER = train_tokenizer(["caption en de fr 0123456789"], vocab_size=300, text_length=12)


class Numbers(IndexedSource):
    """Example i is picture i, captioned "<language> i"; the numbers in `bad` cannot be used."""

    def __init__(self, count, bad=()):
        super().__init__("numbers")
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad and i % 2:
            raise BadSampleError("no caption", str(i))
        image = b"broken" if i in self.bad else picture(i)
        captions = {language: f"{language} {i}" for language in LANGUAGES}
        return Example(str(i), image, captions, group=str(i))


def loader(source, transform=None, **options):
    options = {"batch_size": 4, "seed": 3, **options}
    return TrainLoader(source, transform or FixedTransform(8), TOKENIZER, **options)


@pytest.fixture
def shards(tmp_path):
    for shard in range(4):
        samples = {f"{shard}{i}": pair(10 * shard + i) for i in range(7)}
        samples[f"{shard}3"]["png"] = b"broken"
        write_tar(tmp_path / f"x-{shard}.tar", samples)
    return str(tmp_path / "x-{0..3}.tar")


def streamed(shards, **options):
    return open_source(shards, DataConfig(train_num_samples=options.pop("samples", 28), **options))


def ids(batches):
    return [i for batch in batches for i in batch["image_ids"].tolist()]


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        if key == "image" and isinstance(value, tuple):
            assert value.max_seqlen == other[key].max_seqlen
            for a, b in zip(value[:3], other[key][:3], strict=True):
                assert torch.equal(a, b)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def test_a_batch_holds_matching_images_captions_and_ids():
    source = Numbers(10)
    batch = next(loader(source, captions_per_image=2))
    by_id = {stable_id(str(i)): i for i in range(10)}
    for row in range(4):
        number = by_id[int(batch["image_ids"][row])]
        assert torch.equal(batch["image"][row], FixedTransform(8)(picture(number)))
        for m in (2 * row, 2 * row + 1):
            assert batch["text_ids"][m] == batch["image_ids"][row]
            language = batch["languages"][m]
            assert torch.equal(batch["text"][m], TOKENIZER([f"{language} {number}"])[0])
        assert batch["languages"][2 * row] != batch["languages"][2 * row + 1]


def test_naflex_batches_are_packed_uint8():
    source = Numbers(10)
    batch = next(loader(source, NaflexTransform(4, 6)))
    by_id = {stable_id(str(i)): i for i in range(10)}
    start, end = batch["image"].cu_seqlens[1:3].tolist()
    alone = NaflexTransform(4, 6)(picture(by_id[int(batch["image_ids"][1])]))
    assert batch["image"].patches.dtype == torch.uint8
    assert torch.equal(batch["image"].patches[start:end], alone.patches)


def test_an_example_with_too_few_captions_repeats_them():
    batch = next(loader(Numbers(10), captions_per_image=5))
    for row in range(4):
        drawn = batch["languages"][5 * row : 5 * row + 5]
        assert set(drawn) == set(LANGUAGES)
        assert max(map(drawn.count, drawn)) == 2


def test_every_caption_is_drawn_in_time():
    drawn = {
        (i, lang)
        for b in islice(loader(Numbers(5)), 60)
        for i, lang in zip(b["image_ids"].tolist(), b["languages"], strict=True)
    }
    assert len(drawn) == 15


def test_ids_are_the_same_in_another_process():
    command = "from siglip2.data.batches import stable_id; print(stable_id('Katze'))"
    out = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) == stable_id("Katze")
    assert 0 <= stable_id("Katze") < 2**63


def test_an_epoch_has_each_example_once_over_all_ranks():
    ranks = [loader(Numbers(24), rank=rank, world_size=3) for rank in range(3)]
    epochs = [[ids(islice(rank, 2)) for rank in ranks] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for rank in epoch for i in rank) == sorted(
            stable_id(str(i)) for i in range(24)
        )
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone():
    first, again, other = (ids(islice(loader(Numbers(24), seed=s), 6)) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_source_smaller_than_a_batch_gives_full_batches():
    batch = next(loader(Numbers(3), batch_size=8))
    assert batch["image"].shape[0] == 8
    assert len(set(batch["image_ids"].tolist())) == 3


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


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_examples_are_skipped_and_counted_by_reason(workers, caplog):
    batches = loader(Numbers(12, bad=(2, 5, 8)), batch_size=12, workers=workers)
    with caplog.at_level(logging.WARNING, "siglip2"):
        found = ids(islice(batches, 2))
    assert not {stable_id(str(i)) for i in (2, 5, 8)} & set(found)
    assert len(found) == 24
    report = batches.report()
    assert set(report) == {"cannot decode image", "no caption"}
    assert report["cannot decode image"] >= 4  # two in each of the two epochs
    assert len(caplog.records) == 1
    assert caplog.text.count("numbers: skipped 1 bad examples; last: ") == 1
    batches.close()


def test_streamed_bad_examples_reach_the_main_process(shards):
    batches = loader(streamed(shards), workers=2, shuffle_buffer=5)
    list(islice(batches, 8))  # both workers are in their second epoch
    assert 4 <= batches.report()["cannot decode image"] <= 8
    batches.close()


def test_log_lines_are_rare(caplog):
    from siglip2.data.skipped import Skipped

    skipped = Skipped("x")
    with caplog.at_level(logging.WARNING, "siglip2"):
        skipped.add(BadSampleError("no caption", str(i)) for i in range(2500))
    assert [r.args[1] for r in caplog.records] == [1, 1000, 2000]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_examples_is_an_error(workers, tmp_path):
    with pytest.raises(
        DataError, match="none of the 6 examples of 'numbers' can be used: cannot dec"
    ):
        next(loader(Numbers(6, bad=range(6)), workers=workers))
    write_tar(tmp_path / "a.tar", {str(i): {"png": picture(i)} for i in range(3)})
    source = streamed(str(tmp_path / "a.tar"))
    with pytest.raises(
        DataError, match=r"none of the 3 examples of '.*a.tar' can be used: no caption"
    ):
        next(loader(source, workers=workers))


def test_a_state_of_another_run_is_refused(shards):
    state = loader(Numbers(8)).state_dict()
    with pytest.raises(
        DataError, match=r"cannot resume .* exactly: batch_size 4 -> 2, world_size 1 -> 2"
    ):
        loader(Numbers(8), batch_size=2, world_size=2).load_state_dict(state)
    state = loader(streamed(shards), workers=2).state_dict()
    with pytest.raises(DataError, match="readers 2 -> 1"):
        loader(streamed(shards)).load_state_dict(state)


def test_wrong_options_are_refused(shards):
    with pytest.raises(DataError, match="need batch_size, captions_per_image, shuffle_buffer >= 1"):
        loader(Numbers(8), batch_size=0)
    with pytest.raises(DataError, match="cache_images needs a source that fits in memory"):
        loader(streamed(shards), cache_images=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_one_ordered_pass(workers):
    batches = EvalLoader(Numbers(10, bad=(3,)), FixedTransform(8), batch_size=4, workers=workers)
    for _ in range(2):
        found = list(batches)
        assert [len(b.keys) for b in found] == [4, 4, 1]
        keys = [key for b in found for key in b.keys]
        assert keys == [str(i) for i in range(10) if i != 3]
        assert [i for b in found for i in b.indices] == list(range(9))
        assert torch.equal(found[0].image[3], FixedTransform(8)(picture(4)))
        assert found[0].captions[3] == {language: f"{language} 4" for language in LANGUAGES}
        assert batches.report() == {"no caption": 1}


def test_evaluation_stops_at_max_images_and_reads_streams(shards):
    source = streamed(shards)
    found = list(EvalLoader(source, NaflexTransform(4, 4), batch_size=4, max_images=6))
    assert [len(b.groups) for b in found] == [4, 2]
    assert found[0].image.cu_seqlens.numel() == 5
    assert (
        len([k for b in EvalLoader(source, FixedTransform(4), batch_size=5) for k in b.keys]) == 24
    )


def test_evaluation_of_nothing_is_an_error():
    with pytest.raises(DataError, match="no example of 'numbers' can be used: cannot decode image"):
        list(
            EvalLoader(Numbers(2, bad=(0,)).__class__(1, bad=(0,)), FixedTransform(4), batch_size=2)
        )


def test_importing_the_package_loads_no_optional_one():
    code = (
        "import sys, siglip2.data, siglip2.data.loader, siglip2.data.tokenizer, siglip2.data.tars\n"
        "print([m for m in ('PIL', 'webdataset', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_cached_images_are_read_once(monkeypatch):
    batches = loader(Numbers(30), batch_size=16, cache_images=True)
    list(islice(batches, 3))

    def read_again(self, i):
        raise AssertionError(f"example {i} was read twice")

    monkeypatch.setattr(Numbers, "__getitem__", read_again)
    assert len(set(ids(islice(batches, 6)))) == 30
