import logging
import subprocess
import sys
from itertools import islice

import pytest
import torch
from data.made_examples import LANGUAGES, TOKENIZER, Numbers, ids, loader, streamed
from data.made_files import picture, write_tar

from siglip2.data.batches import stable_id
from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.data.types import BadSampleError
from siglip2.errors import DataError


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


def test_wrong_options_are_refused(shards):
    with pytest.raises(DataError, match="need batch_size, captions_per_image, shuffle_buffer >= 1"):
        loader(Numbers(8), batch_size=0)
    with pytest.raises(DataError, match="cache_images needs a source that fits in memory"):
        loader(streamed(shards), cache_images=True)


def test_importing_the_package_loads_no_optional_one():
    code = (
        "import sys, siglip2.data, siglip2.data.loader, siglip2.data.tokenizer, siglip2.data.tars\n"
        "print([m for m in ('PIL', 'webdataset', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
