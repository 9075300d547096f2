"""A batch in parts: the loss, gradients and weights of the whole, at the memory of a part."""

import pytest
import torch

from compare import assert_no_worse
from siglip2.config import OptimConfig
from siglip2.data.types import PackedImages
from siglip2.errors import NonFiniteLossError
from siglip2.losses import SigLipLoss
from siglip2.models.inputs import batch_size, take_images
from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.accumulate import accumulate
from siglip2.train.optim import adamw
from siglip2.train.step import TrainStep
from siglip2.train.task import Siglip2Task

GRIDS = [(4, 4), (2, 3), (1, 4), (3, 3), (2, 2), (4, 1), (1, 1)]
WIDTH = 3 * 8**2


def make_task(dtype=torch.float64, name="siglip2-tiny-patch8-32", **options):
    torch.manual_seed(0)
    model = Siglip2(architecture(name, text_length=8), init_bias=-2.0, dtype=dtype)
    model.init_weights()
    model = model.to(dtype) if dtype == torch.float64 else model
    return Siglip2Task(model, loss=SigLipLoss(normalize=True, **options))


def padded(images):
    """Each image's patches in the first rows of a padded batch, and their (y, x)."""
    longest = max(h * w for h, w in GRIDS)
    patches = torch.zeros(len(GRIDS), longest, WIDTH, dtype=images.dtype)
    coord = torch.zeros(len(GRIDS), longest, 2, dtype=torch.int64)
    valid = torch.zeros(len(GRIDS), longest, dtype=torch.bool)
    start = 0
    for i, (h, w) in enumerate(GRIDS):
        patches[i, : h * w] = images[start : start + h * w]
        coord[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
        start += h * w
    return patches, coord, valid


def make_images(dialect, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    if dialect == "tensor":
        return torch.rand(len(GRIDS), 3, 32, 32, generator=g, dtype=dtype) * 2 - 1
    lengths = torch.tensor([h * w for h, w in GRIDS])
    flat = torch.rand(int(lengths.sum()), WIDTH, generator=g, dtype=dtype) * 2 - 1
    if dialect == "packed":
        cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return PackedImages(flat, torch.tensor(GRIDS).int(), cu, int(lengths.max()))
    patches, coord, valid = padded(flat)
    if dialect == "timm":
        return {"patches": patches, "patch_coord": coord, "patch_valid": valid, "seq_len": 16}
    return {
        "pixel_values": patches,
        "pixel_attention_mask": valid.int(),
        "spatial_shapes": torch.tensor(GRIDS),
    }


def make_batch(dialect="tensor", captions=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(4)
    images = make_images(dialect, dtype)
    num = len(GRIDS)
    batch = {"image": images, "text": torch.randint(5, 500, (num * captions, 8), generator=g)}
    if captions > 1:
        ids = torch.arange(num) // 2
        batch |= {"image_ids": ids, "text_ids": ids.repeat_interleave(captions)}
    return batch


def gradients(task, batch, accum_steps):
    task.zero_grad()
    if accum_steps == 1:
        losses, report = task(batch)
        losses["loss"].backward()
    else:
        losses, report = accumulate(task, batch, accum_steps)
    return losses, report, {name: p.grad.clone() for name, p in task.named_parameters()}


@pytest.mark.parametrize("accum_steps", [2, 3, 7])
@pytest.mark.parametrize(
    ("dialect", "captions"),
    [("tensor", 1), ("tensor", 3), ("packed", 1), ("timm", 1), ("hf", 2)],
)
def test_parts_give_the_loss_and_gradients_of_the_whole(dialect, captions, accum_steps):
    batch = make_batch(dialect, captions)
    task = make_task()
    whole, report, expected = gradients(task, batch, 1)
    losses, part_report, actual = gradients(task, batch, accum_steps)
    assert losses.keys() == whole.keys()
    for name in losses:
        assert_no_worse(name, losses[name], whole[name], whole[name], torch.float64)
    for name in expected:
        # A sum over the batch in another order: roundings scale with the largest gradient.
        largest = float(max(g.abs().max() for g in expected.values()))
        assert_no_worse(
            name, actual[name], expected[name], expected[name], torch.float64, terms=largest
        )
    assert report == part_report


def test_ignored_pairs_stay_ignored():
    task, ids = make_task(), torch.tensor([0, 0, 1, 2, 2, 3, 4])
    batch = make_batch() | {"image_ignore_ids": ids, "text_ignore_ids": ids}
    plain = task(make_batch())[0]["loss"]
    whole = task(batch)[0]["loss"]
    assert whole < plain
    assert float(accumulate(task, batch, 3)[0]["loss"]) == pytest.approx(whole.item(), rel=1e-13)


def test_weights_after_several_steps_are_the_same():
    ends = []
    for accum_steps in (1, 3):
        task = make_task()
        sgd = torch.optim.SGD(task.parameters(), lr=0.05)
        step = TrainStep(task, sgd, accum_steps=accum_steps)
        losses = [float(step(make_batch())["loss"]) for _ in range(5)]
        ends.append((losses, [p.detach().clone() for p in task.parameters()]))
    (losses, whole), (part_losses, parts) = ends
    assert part_losses == pytest.approx(losses, rel=1e-12)
    assert losses[-1] < losses[0]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12 * float(one.abs().max()))


class SavedBytes:
    """Bytes that autograd holds for backward passes, weights aside: now and at most."""

    def __init__(self, task):
        self.weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
        self.now = self.most = 0

    def pack(self, x):
        return Held(x, self)

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)


class Held:
    def __init__(self, tensor, counter):
        of_weight = tensor.untyped_storage().data_ptr() in counter.weights
        self.tensor, self.counter = tensor, counter
        self.bytes = 0 if of_weight else tensor.numel() * tensor.element_size()
        counter.now += self.bytes
        counter.most = max(counter.most, counter.now)

    def __del__(self):
        self.counter.now -= self.bytes


def saved_bytes(accum_steps):
    task = make_task(torch.float32)
    step = TrainStep(task, adamw(task, OptimConfig()), accum_steps=accum_steps)
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    counter = SavedBytes(task)
    with counter.hooks():
        step({"image": images, "text": torch.randint(5, 500, (16, 8))})
    return counter.most


def test_memory_falls_with_the_number_of_parts():
    whole = saved_bytes(1)
    assert saved_bytes(4) < whole / 3.5
    assert saved_bytes(8) < whole / 6


def test_a_batch_smaller_than_its_parts_is_refused():
    step = TrainStep(make_task(), torch.optim.SGD([torch.zeros(1)]), accum_steps=8)
    with pytest.raises(
        ValueError,
        match=r"at least 8 images and texts a step for accum_steps=8; got 7 images and 7",
    ):
        step(make_batch())


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_non_finite_part_spoils_the_step_and_not_the_weights(tmp_path, on_nonfinite):
    task = make_task(torch.float32)
    step = TrainStep(
        task,
        adamw(task, OptimConfig()),
        accum_steps=3,
        on_nonfinite=on_nonfinite,
        debug_dir=tmp_path,
    )
    batch = make_batch(dtype=torch.float32)
    step(batch)
    before = [p.detach().clone() for p in task.parameters()]
    bad = {**batch, "image": batch["image"].index_fill(0, torch.tensor([5]), torch.nan)}
    if on_nonfinite == "raise":
        with pytest.raises(
            NonFiniteLossError, match="step 1: objective sigmoid_loss is not finite"
        ):
            step(bad)
        saved = torch.load(tmp_path / "step_000000001.pt", weights_only=True)
        assert torch.isnan(saved["image"][5]).all()
    else:
        step(bad)
        assert step.num_skipped == 1
    assert all(torch.equal(old, p) for old, p in zip(before, task.parameters(), strict=True))


def test_half_precision_embeddings_reach_the_loss_as_they_are():
    task = make_task(torch.bfloat16)
    seen = []
    task.sigmoid.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    batch = make_batch(dtype=torch.float32)
    whole = gradients(task, batch, 1)
    parts = gradients(task, batch, 3)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert parts[0]["loss"].item() == pytest.approx(whole[0]["loss"].item(), rel=2**-8)


@pytest.mark.parametrize("dialect", ["tensor", "packed", "timm", "hf"])
def test_rows_of_any_dialect_embed_like_the_whole(dialect):
    model, images = make_task().model, make_images(dialect)
    assert batch_size(images) == len(GRIDS)
    whole = model.encode_image(images)
    for first, last in ((0, 3), (3, 4), (4, 7), (2, 2)):
        part = take_images(images, first, last)
        assert batch_size(part) == last - first
        assert torch.allclose(model.encode_image(part), whole[first:last], rtol=0, atol=1e-12)


def test_what_is_no_image_batch_is_refused():
    with pytest.raises(ValueError, match=r"need an image tensor .* got \['pixels'\]"):
        batch_size({"pixels": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"need an image tensor .* got str"):
        take_images("pictures", 0, 1)
