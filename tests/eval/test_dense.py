"""Probe, scores and votes against arithmetic written out here; a model that sees colours."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval.tiny import tiny_model

from siglip2.data.regions import Region
from siglip2.data.scenes import _WORDS, Scene, Scenes
from siglip2.data.sources import IndexedSource
from siglip2.data.types import Example
from siglip2.eval.dense import (
    DenseImages,
    embed_scenes,
    evaluate_dense,
    fit_probe,
    knn_accuracy,
    label_map,
    patch_shares,
    scores,
    segment,
    segmentation,
)


class Colours(IndexedSource):
    """Discs of a colour each, white around."""

    def __init__(self, count=6):
        super().__init__("colours")
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        import io

        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (40, 40), "white")
        shades = [(220, 30, 30), (30, 200, 60), (30, 60, 220), (0, 0, 0), (230, 200, 0), (90,) * 3]
        ImageDraw.Draw(picture).ellipse((4, 4, 36, 36), fill=shades[i])
        out = io.BytesIO()
        picture.save(out, "PNG")
        names = {language: f"{language}{i}" for language in _WORDS}
        return Example(str(i), out.getvalue(), names, group=f"g{i}")


def test_labels_are_what_is_drawn_inside_each_box():
    pixels = np.full((10, 20, 3), 255, dtype=np.uint8)
    pixels[2:5, 3:6] = (10, 20, 255)
    pixels[3, 4] = 255  # white inside a drawing
    pixels[6:9, 12:18] = 0
    pixels[9, 0] = 7  # outside of every box
    boxes = [(0.1, 0.1, 0.4, 0.6), (0.6, 0.6, 0.9, 0.9)]
    regions = tuple(Region({"en": "x"}, box) for box in boxes)
    labels = label_map(Scene(pixels, regions, ("b", "a")), ["a", "b"])
    wanted = torch.zeros(10, 20, dtype=torch.int64)
    wanted[2:5, 3:6], wanted[3, 4], wanted[6:9, 12:18] = 2, 0, 1
    assert torch.equal(labels, wanted)


def test_a_scenes_labels_cover_its_boxes_and_nothing_else():
    scenes, classes = Scenes(Colours(), canvas_px=60), [f"g{i}" for i in range(6)]
    for index in range(10):
        scene = scenes.scene(index)
        labels, inside = label_map(scene, classes), torch.zeros(60, 60, dtype=torch.bool)
        for region, group in zip(scene.regions, scene.groups, strict=True):
            x0, y0, x1, y1 = (round(60 * c) for c in region.box)
            inside[y0:y1, x0:x1] = True
            share = (labels[y0:y1, x0:x1] == 1 + classes.index(group)).float().mean().item()
            assert math.pi / 4 - 0.1 < share < math.pi / 4 + 0.2  # a disc, soft edges included
        assert not labels[~inside].any()


def test_shares_are_counts_of_pixels():
    labels = torch.randint(4, (6, 9), generator=torch.Generator().manual_seed(0))
    found = patch_shares(labels, (2, 3), 4)
    for y in range(2):
        for x in range(3):
            pixels = labels[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].flatten()
            wanted = torch.bincount(pixels, minlength=4) / 9
            torch.testing.assert_close(found[3 * y + x], wanted)
    assert torch.allclose(patch_shares(labels, (4, 5), 4).sum(1), torch.ones(20))


def test_probe_is_at_the_optimum():
    g = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(200, 5, generator=g) * torch.tensor([1.0, 10, 0.1, 1, 0])
    target = torch.rand(200, 4, generator=g)
    target = target / target.sum(1, keepdim=True)
    probe = fit_probe(x, target, l2=0.01)
    again = fit_probe(x, target, l2=0.01)
    assert all(torch.equal(a, b) for a, b in zip(probe, again, strict=True))
    deviation = x.double().std(0, correction=0)

    def steepest(weight, bias):
        weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
        value = F.cross_entropy(x.double() @ weight + bias, target.double())
        value = value + 0.01 / 2 * (weight * deviation[:, None]).square().sum()
        grads = torch.autograd.grad(value, [weight, bias])
        return max(float(grad.abs().max()) for grad in grads)

    # What float32 leaves of it: the weights are rounded.
    assert steepest(*probe) < 1e-3 * steepest(*map(torch.zeros_like, probe))
    assert not probe.weight[4].any()  # a token that never changes tells nothing


def test_scores_are_intersections_over_unions():
    g = torch.Generator().manual_seed(0)
    true, found = torch.randint(4, (2, 500), generator=g)
    true[true == 3] = 1  # a class that is found and never there
    counts = torch.zeros(4, 4, dtype=torch.int64)
    for t, f in zip(true.tolist(), found.tolist(), strict=True):
        counts[t, f] += 1
    result = scores(counts)
    ious = {}
    for c in range(3):
        both = ((true == c) & (found == c)).sum().item()
        ious[c] = both / ((true == c) | (found == c)).sum().item()
    assert result.ious == pytest.approx(ious)
    assert result.miou == pytest.approx(sum(ious.values()) / 3)
    assert result.object_miou == pytest.approx((ious[1] + ious[2]) / 2)
    assert result.pixel_accuracy == (true == found).sum().item() / 500
    assert result.background_miou == pytest.approx((true == 0).float().mean().item() / 3)


def sets(num, informative, seed=0):
    """Images of 4x4 patches of 3 pixels; tokens say the class, or are noise."""
    g = torch.Generator().manual_seed(seed)
    images = DenseImages([], [], [], torch.empty(0))
    for _ in range(num):
        classes = torch.randint(3, (4, 4), generator=g)
        images.labels.append(classes.repeat_interleave(3, 0).repeat_interleave(3, 1))
        noise = torch.randn(16, 8, generator=g)
        if informative:
            noise[:, :3] += 20 * F.one_hot(classes.flatten(), 3)
        images.tokens.append(noise)
        images.grids.append((4, 4))
    return images


def test_tokens_that_say_the_class_are_segmented_and_noise_is_not():
    result = segmentation(sets(40, True), sets(10, True, 1), 3)
    # Logits are bilinear: near an edge of two classes a third's may win, or the edge may move.
    assert result.miou > 0.85
    assert result.pixel_accuracy > 0.9
    noise = segmentation(sets(40, False), sets(10, False, 1), 3)
    assert noise.pixel_accuracy < 0.45
    with pytest.raises(ValueError, match="need images to fit a probe on and to score it on; got 0"):
        segmentation(sets(0, True), sets(1, True), 3)


def test_logits_between_patches_are_bilinear():
    probe = fit_probe(torch.eye(2), torch.eye(2), l2=0.1)
    found = segment(probe, torch.eye(2), (1, 2), (2, 8))
    assert found.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_nearest_neighbours_vote():
    g = torch.Generator().manual_seed(0)
    train, test = (F.normalize(torch.randn(n, 6, generator=g), dim=1) for n in (50, 30))
    labels, asked = torch.randint(5, (50,), generator=g), torch.randint(5, (30,), generator=g)
    right = 0
    for row, label in zip(test, asked.tolist(), strict=True):
        near = sorted(range(50), key=lambda i: -float(train[i] @ row))[:7]
        votes = [
            sum(math.exp(float(train[i] @ row) / 0.07) for i in near if labels[i] == c)
            for c in range(5)
        ]
        right += max(range(5), key=votes.__getitem__) == label
    for chunk_size in (7, 4096):
        found = knn_accuracy(train, labels, test, asked, k=7, chunk_size=chunk_size)
        assert found == right / 30
    assert knn_accuracy(train, labels, train, labels, k=1) == 1.0
    with pytest.raises(ValueError, match="and k >= 1; got 50 and 30 images, k=0"):
        knn_accuracy(train, labels, test, asked, k=0)


def test_a_random_tower_already_tells_colours_apart():
    """Random projections of discs of one colour: far better than saying background everywhere."""
    train, test = (Scenes(Colours(), canvas_px=64, held_out=held) for held in (False, True))
    model = tiny_model()
    result = evaluate_dense(model, train, test, num_train=80, num_test=30, batch_size=32, k=5)
    assert result.num_classes == 7
    assert result.segmentation.miou > 2 * result.segmentation.background_miou
    assert result.knn_accuracy > 3 / 6
    again = evaluate_dense(model, train, test, num_train=80, num_test=30, batch_size=32, k=5)
    assert again == result


def test_features_are_the_towers():
    scenes, classes = [Scenes(Colours(), canvas_px=64).scene(0)], [f"g{i}" for i in range(6)]
    images = embed_scenes(tiny_model(), scenes, classes)
    assert torch.equal(images.labels[0], label_map(scenes[0], classes))
    assert (images.grids, images.tokens[0].shape) == ([(4, 4)], (16, 64))
    torch.testing.assert_close(images.pooled.norm(dim=1), torch.ones(1))
