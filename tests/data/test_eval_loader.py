import pytest
import torch
from data.made_examples import LANGUAGES, Numbers, streamed
from data.made_files import picture

from siglip2.data.eval_loader import EvalLoader
from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.errors import DataError


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
