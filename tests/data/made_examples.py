"""A source of numbered examples, and loaders of it."""

import torch
from data.made_files import picture

from siglip2.config import DataConfig
from siglip2.data.images import FixedTransform
from siglip2.data.loader import TrainLoader
from siglip2.data.sources import IndexedSource, open_source
from siglip2.data.train_tokenizer import train_tokenizer
from siglip2.data.types import BadSampleError, Example

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
