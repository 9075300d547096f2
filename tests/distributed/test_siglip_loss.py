"""Any number of ranks, with any number of rows each, give one rank's loss and gradients."""

import logging

import pytest
import torch
import torch.nn.functional as F

from compare import assert_no_worse
from ranks import run
from siglip2.losses import SigLipLoss
from siglip2_kernels.sigmoid_loss import reference

D = 24


def make_inputs(num_images: int, captions: int = 1, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    img = F.normalize(torch.randn(num_images, D, generator=g, dtype=dtype), dim=-1)
    txt = F.normalize(torch.randn(num_images * captions, D, generator=g, dtype=dtype), dim=-1)
    ids = torch.arange(num_images) // 2  # pairs of images show the same thing
    return img, txt, ids, ids.repeat_interleave(captions)


def loss_of_share(rank, world, sizes, captions, dtype):
    img, txt, image_ids, text_ids = make_inputs(sum(sizes), captions, dtype)
    first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
    img = img[first:last].requires_grad_()
    txt = txt[first * captions : last * captions].requires_grad_()
    scale = torch.tensor(10.0, requires_grad=True)
    bias = torch.tensor(-5.0, requires_grad=True)
    ids = {}
    if captions > 1:
        ids = {
            "image_ids": image_ids[first:last],
            "text_ids": text_ids[first * captions : last * captions],
        }
    loss = SigLipLoss()(img, txt, scale, bias, **ids)
    loss.backward()
    return [x.detach() for x in (loss, img.grad, txt.grad, scale.grad, bias.grad)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("sizes", "captions"),
    [((4, 4), 1), ((5, 2), 1), ((0, 3), 1), ((1, 0), 1), ((3, 1, 4, 2), 1), ((4, 3), 2)],
    ids=[
        "equal",
        "uneven",
        "empty-rank",
        "one-image-two-ranks",
        "four-ranks",
        "groups-and-two-captions",
    ],
)
def test_mean_over_ranks_is_the_one_rank_loss(sizes, captions):
    world, dtype = len(sizes), torch.float32
    shares = run(world, loss_of_share, sizes, captions, dtype)
    loss = torch.stack([s[0] for s in shares]).mean()
    # DDP divides summed gradients by the number of ranks.
    dimg, dtxt = (torch.cat([s[i] for s in shares]) / world for i in (1, 2))
    dscale, dbias = (torch.stack([s[i] for s in shares]).mean() for i in (3, 4))

    def single(dtype):
        img, txt, image_ids, text_ids = make_inputs(sum(sizes), captions, torch.float32)
        img, txt = (x.to(dtype).requires_grad_() for x in (img, txt))
        scale = torch.tensor(10.0, dtype=dtype, requires_grad=True)
        bias = torch.tensor(-5.0, dtype=dtype, requires_grad=True)
        ids = {"img_ids": image_ids, "txt_ids": text_ids} if captions > 1 else {}
        value = reference.sigmoid_loss(img, txt, scale.log(), bias, **ids)
        value.backward()
        return [x.detach() for x in (value, img.grad, txt.grad, scale.grad, bias.grad)]

    names = ("loss", "dimg", "dtxt", "dscale", "dbias")
    actual = (loss, dimg, dtxt, dscale, dbias)
    for name, a, e, g in zip(names, actual, single(dtype), single(torch.float64), strict=True):
        assert_no_worse(name, a, e, g, dtype)


def mismatched_share(rank, world):
    img, txt, _, _ = make_inputs(4)
    try:
        SigLipLoss()(img, txt[: 4 - rank], torch.tensor(10.0), torch.tensor(-5.0))
    except ValueError as error:
        return str(error)


@pytest.mark.dist
def test_every_rank_hears_of_one_rank_with_too_few_texts():
    for message in run(2, mismatched_share):
        assert "got [4, 4] images and [4, 3] texts" in message


def test_open_clip_names_are_mapped_with_a_note(caplog):
    with caplog.at_level(logging.INFO, logger="siglip2"):
        SigLipLoss(dist_impl="bidir")
    assert "using 'gather'" in caplog.text


def test_rejects_an_unknown_dist_impl():
    with pytest.raises(NotImplementedError, match=r"need dist_impl 'gather'.*got 'tree'"):
        SigLipLoss(dist_impl="tree")


def test_rejects_a_world_size_without_a_process_group():
    with pytest.raises(ValueError, match="world_size=8 but the process group has 1 ranks"):
        SigLipLoss(world_size=8)


def test_rejects_ids_for_one_side_only():
    img, txt, ids, _ = make_inputs(4)
    with pytest.raises(ValueError, match="need both image_ids and text_ids"):
        SigLipLoss()(img, txt, torch.tensor(10.0), torch.tensor(-5.0), image_ids=ids)
