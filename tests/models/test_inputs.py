"""What the encoders refuse, and what they say."""

import pytest
import torch
from models.tiny import packed, padded, random_images, random_model, timm_batch, tiny_architecture

from siglip2.train.task import Siglip2Task

GRIDS = [(4, 4), (2, 7)]


@pytest.fixture(scope="module")
def fixed():
    return random_model(tiny_architecture())


@pytest.fixture(scope="module")
def naflex():
    return random_model(tiny_architecture(is_naflex=True))


def test_rejects_what_is_no_batch(fixed):
    with pytest.raises(ValueError, match=r"need an image tensor .*; got list"):
        fixed.encode_image([1, 2])
    with pytest.raises(ValueError, match=r"got \['patches', 'wrong'\]"):
        fixed.encode_image({"patches": torch.zeros(1), "wrong": torch.zeros(1)})


def test_rejects_image_tensors_of_another_shape_or_range(fixed):
    with pytest.raises(ValueError, match=r"need images \(B, 3, H, W\); got \(3, 16, 16\)"):
        fixed.encode_image(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"need images \(B, 3, 16, 16\); got \(1, 3, 16, 32\)"):
        fixed.encode_image(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match=r"in \[-1, 1\]; got torch.uint8. Use x / 127.5 - 1"):
        fixed.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_rejects_patches_of_another_size_or_number(naflex):
    images = random_images(GRIDS, 4)
    with pytest.raises(
        ValueError, match=r"need patches \(T, 48\) for patch size 4; got \(30, 27\)"
    ):
        naflex.encode_image(packed(random_images(GRIDS, 3), GRIDS))
    with pytest.raises(ValueError, match=r"need 31 patches for grids .*; got 30"):
        naflex.encode_image(packed(images, [(4, 4), (3, 5)])._replace(patches=torch.cat(images)))
    batch = padded(images, GRIDS)
    batch["pixel_attention_mask"][0, 3] = 0
    with pytest.raises(ValueError, match=r"need 30 patches .*; got 29"):
        naflex.encode_image(batch)


def test_rejects_patches_out_of_order(naflex):
    batch = timm_batch(random_images(GRIDS, 4), GRIDS)
    batch["patch_coord"][0, [0, 1]] = batch["patch_coord"][0, [1, 0]]
    with pytest.raises(ValueError, match="need every patch of each image, row by row"):
        naflex.encode_image(batch)


def test_rejects_text_of_another_length_or_type(fixed):
    for text in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"need token ids \(B, 6\) .*Use siglip2.get_tokenizer"
        ):
            fixed.encode_text(text)
    with pytest.raises(ValueError, match=r"got \(2, 6\) torch.float32"):
        fixed.encode_text(torch.zeros(2, 6))


@pytest.mark.parametrize("wrong", [-1, None], ids=["negative", "too-large"])
def test_rejects_ids_outside_the_vocabulary(fixed, wrong):
    length = fixed.architecture.text.length
    vocab_size = fixed.architecture.text.vocab_size
    text = torch.full((2, length), vocab_size if wrong is None else wrong)
    with pytest.raises(ValueError, match=rf"from 0 to {vocab_size - 1}; got .*not this model's"):
        fixed.encode_text(text)


def test_an_empty_batch_costs_nothing_and_trains_nothing(fixed):
    length = fixed.architecture.text.length
    side = fixed.architecture.vision.image_size
    task = Siglip2Task(fixed)
    batch = {"image": torch.zeros(0, 3, side, side), "text": torch.zeros(0, length).long()}
    loss = task(batch)[0]["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in fixed.parameters())
