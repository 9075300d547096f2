"""`keep_groups`: images of one thing meet in one batch.

Nothing else about the order is lost.
"""

from pathlib import Path

import pytest

from siglip2.config import DataConfig, QuickstartConfig
from siglip2.data.images import FixedTransform
from siglip2.data.loader import TrainLoader
from siglip2.data.sources import open_source
from siglip2.data.tars import StreamedTars
from siglip2.data.tokenizer import get_tokenizer
from siglip2.errors import DataError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return open_source(
        "quickstart:train", DataConfig(quickstart=QuickstartConfig(concepts=20, cache_dir=cache))
    )


def make_loader(source, tokenizer, **options):
    return TrainLoader(
        source, FixedTransform(16), tokenizer, batch_size=8, seed=0, cache_images=True, **options
    )


def neighbours(loader, num_batches):
    """How often an image's group occurs again in its batch, over some batches."""
    again = 0
    for _ in range(num_batches):
        ids = next(loader)["image_ids"]
        again += sum(int((ids == i).sum()) - 1 for i in ids)
    return again


def test_images_of_a_group_meet_in_a_batch(source):
    tokenizer = get_tokenizer(source.tokenizer_path, text_length=8)
    num = len(source) // 8
    together = neighbours(make_loader(source, tokenizer, keep_groups=True), num)
    # Only a group at the edge of a batch can be parted.
    assert together >= 8 * num - 2 * num > 2 * neighbours(make_loader(source, tokenizer), num)


def test_an_epoch_still_holds_every_image_once(source):
    tokenizer = get_tokenizer(source.tokenizer_path, text_length=8)
    loader = make_loader(source, tokenizer, keep_groups=True)
    batches = loader._indexed
    first, second = batches._order(0), batches._order(1)
    assert sorted(first) == sorted(second) == list(range(len(source)))
    assert list(first) != list(second)


def test_streamed_shards_are_refused():
    source = StreamedTars("x.tar", ["x.tar"])
    with pytest.raises(DataError, match="keep_groups needs a source whose examples are at hand"):
        TrainLoader(source, FixedTransform(16), None, batch_size=2, seed=0, keep_groups=True)
    assert not Path("x.tar").exists()
