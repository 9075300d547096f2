"""What frozen features know of places: a linear probe on patch tokens, and k-NN on embeddings.

The probe is DINOv2's linear segmentation: logistic regression on single tokens, whose logits are
brought to the label map's pixels bilinearly. It is fitted to the share of each class among a
patch's pixels, by LBFGS over all training patches at once; the problem is convex, so nothing is
drawn and no rate is tuned. The score is the mean over classes of intersection over union, over
all pixels of all images (ADE20K's and VOC's; the background is a class).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.data.images import FixedTransform, NaflexTransform
from siglip2.data.scenes import WHITE, Scene, Scenes
from siglip2.errors import require
from siglip2.eval.embed import inference
from siglip2.models.inputs import vision_inputs
from siglip2.models.siglip2 import Siglip2, normalize

# LBFGS has converged long before, on standardised tokens.
_MAX_ITERATIONS = 300
_KNN_TEMP = 0.07  # DINO's


class DenseImages(NamedTuple):
    """Frozen features of images, with a class for each pixel."""

    tokens: list[Tensor]  # (n, D) float32 of each image, row by row
    grids: list[tuple[int, int]]  # patches down and across
    labels: list[Tensor]  # (H, W) int64
    pooled: Tensor  # (N, D) float32, unit rows


class Segmentation(NamedTuple):
    miou: float  # mean over the classes that occur, the background included
    object_miou: float  # the same without the background
    pixel_accuracy: float
    background_miou: float  # of saying "background" everywhere
    ious: dict[int, float]  # class -> intersection over union


class LinearProbe(NamedTuple):
    """Logits are tokens @ weight + bias."""

    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)


def label_map(scene: Scene, classes: Sequence[str]) -> Tensor:  # (H, W) int64
    """Class of every pixel: 0, or 1 + the number of its drawing's group in `classes`.

    Drawn is what is not white inside a region's box; white parts of a drawing are background.
    """
    number = {group: i for i, group in enumerate(classes, 1)}
    H, W = scene.pixels.shape[:2]
    labels = np.zeros((H, W), dtype=np.int64)
    for region, group in zip(scene.regions, scene.groups, strict=True):
        sides = zip(region.box, (W, H, W, H), strict=True)
        x0, y0, x1, y1 = (round(share * side) for share, side in sides)
        drawn = (scene.pixels[y0:y1, x0:x1] != WHITE).any(-1)
        labels[y0:y1, x0:x1][drawn] = number[group]
    return torch.from_numpy(labels)


def embed_scenes(
    model: Siglip2,
    scenes: Sequence[Scene],
    classes: Sequence[str],
    *,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> DenseImages:
    """Tokens after the final norm, and pooled embeddings, of scenes at the model's own size."""
    Image = require("PIL.Image", "data")
    vision = model.architecture.vision
    transform = (
        NaflexTransform(vision.patch_size, vision.grid_size**2)
        if vision.is_naflex
        else FixedTransform(vision.image_size)
    )
    found = DenseImages([], [], [], torch.empty(0, vision.size.width))
    pooled = []
    with inference(model):
        for start in range(0, len(scenes), batch_size):
            part = scenes[start : start + batch_size]
            prepared = [transform.prepare(Image.fromarray(scene.pixels)) for scene in part]
            inputs = vision_inputs(transform.collate(prepared), vision, model.device)
            out = model.vision(*inputs, model.dtype)
            grids = [(h, w) for h, w in inputs.grid_hw.tolist()]
            found.tokens.extend(out.tokens.float().split([h * w for h, w in grids]))
            found.grids.extend(grids)
            pooled.append(normalize(out.pooled))
            found.labels.extend(_seen(label_map(scene, classes), model) for scene in part)
            if progress:
                progress(len(found.grids))
    return found._replace(pooled=torch.cat(pooled)) if pooled else found


def _seen(labels: Tensor, model: Siglip2) -> Tensor:
    """Without the pixels that whole patches leave over at the right and bottom (So400m/14, 384)."""
    vision = model.architecture.vision
    if vision.is_naflex:
        return labels
    share = vision.grid_size * vision.patch_size / vision.image_size
    H, W = (round(share * side) for side in labels.shape)
    return labels[:H, :W]


def patch_shares(
    labels: Tensor,  # (H, W) int64
    grid: tuple[int, int],
    num_classes: int,
) -> Tensor:  # (h * w, C) float32, rows sum to 1
    """Share of each class among the pixels of each patch."""
    one_hot = F.one_hot(labels, num_classes).permute(2, 0, 1).float()
    return F.adaptive_avg_pool2d(one_hot, grid).flatten(1).T


def fit_probe(
    tokens: Tensor,  # (T, D)
    shares: Tensor,  # (T, C) rows sum to 1
    *,
    l2: float = 1e-4,
) -> LinearProbe:
    """Logistic regression by LBFGS on standardised tokens, in float64.

    Args:
        l2: Half of it times the squared weights is added to the mean cross entropy.
    """
    x, target = tokens.double(), shares.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)
    x = (x - mean) / deviation
    weight = x.new_zeros(x.shape[1], target.shape[1], requires_grad=True)
    bias = x.new_zeros(target.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        losses = F.cross_entropy(x @ weight + bias, target)
        value = losses + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    scaled = weight.detach() / deviation[:, None]
    return LinearProbe(scaled.float(), (bias.detach() - mean @ scaled).float())


def segment(
    probe: LinearProbe,
    tokens: Tensor,  # (h * w, D)
    grid: tuple[int, int],
    size: tuple[int, int],  # pixels down and across
) -> Tensor:  # (H, W) int64
    """The likeliest class of each pixel; logits between patches are bilinear."""
    logits = (tokens @ probe.weight + probe.bias).T.view(1, -1, *grid)
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits[0].argmax(0)


def confusion(
    found: Tensor,  # (N,) int64
    true: Tensor,  # (N,) int64
    num_classes: int,
) -> Tensor:  # (C, C) int64: true class, found class
    counts = torch.bincount(true * num_classes + found, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def segmentation(
    train: DenseImages, test: DenseImages, num_classes: int, *, l2: float = 1e-4
) -> Segmentation:
    """Fit a probe on one set and score it on the other.

    Raises ValueError for a set without images.
    """
    if not train.tokens or not test.tokens:
        got = f"{len(train.tokens)} and {len(test.tokens)}"
        raise ValueError(f"need images to fit a probe on and to score it on; got {got}")
    pairs = zip(train.labels, train.grids, strict=True)
    shares = torch.cat([patch_shares(labels, grid, num_classes) for labels, grid in pairs])
    tokens = torch.cat(train.tokens)
    probe = fit_probe(tokens, shares.to(tokens.device), l2=l2)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for tokens, grid, labels in zip(test.tokens, test.grids, test.labels, strict=True):
        found = segment(probe, tokens, grid, tuple(labels.shape)).cpu()
        counts += confusion(found.flatten(), labels.flatten(), num_classes)
    return scores(counts)


def scores(counts: Tensor) -> Segmentation:  # (C, C) int64: true class, found class
    """Of a confusion matrix; classes that do not occur in the truth have no score."""
    true, found, both = counts.sum(1), counts.sum(0), counts.diagonal()
    ious = both / (true + found - both).clamp(min=1)
    occurring = torch.nonzero(true)[:, 0].tolist()
    by_class = {i: float(ious[i]) for i in occurring}
    objects = [iou for i, iou in by_class.items() if i > 0]
    total = int(true.sum())
    return Segmentation(
        miou=_mean(list(by_class.values())),
        object_miou=_mean(objects),
        pixel_accuracy=int(both.sum()) / max(total, 1),
        background_miou=int(true[0]) / max(total, 1) / max(len(occurring), 1),
        ious=by_class,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def knn_accuracy(
    train: Tensor,  # (M, D) unit rows
    train_labels: Tensor,  # (M,) int64
    test: Tensor,  # (N, D) unit rows
    test_labels: Tensor,  # (N,) int64
    *,
    k: int = 20,
    chunk_size: int = 4096,
) -> float:
    """DINO's k-NN classifier: the k nearest vote with exp(cosine / 0.07).

    Raises ValueError for a set without images, or k below 1.
    """
    if not len(train) or not len(test) or k < 1:
        got = f"{len(train)} and {len(test)} images, k={k}"
        raise ValueError(f"need images to vote and to be classified, and k >= 1; got {got}")
    num_classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    train_labels = train_labels.to(train.device)
    right = 0
    for start in range(0, len(test), chunk_size):
        near = (test[start : start + chunk_size] @ train.T).topk(min(k, len(train)), dim=1)
        votes = near.values.new_zeros(len(near.values), num_classes)
        votes.scatter_add_(1, train_labels[near.indices], (near.values / _KNN_TEMP).exp())
        right += int((votes.argmax(1).cpu() == test_labels[start : start + chunk_size].cpu()).sum())
    return right / len(test)


class DenseResult(NamedTuple):
    segmentation: Segmentation
    knn_accuracy: float  # of scenes of one drawing, which of the concepts it is
    num_classes: int  # with the background


def evaluate_dense(
    model: Siglip2,
    train: Scenes,
    test: Scenes,
    *,
    num_train: int = 1000,
    num_test: int = 500,
    batch_size: int = 256,
    l2: float = 1e-4,
    k: int = 20,
) -> DenseResult:
    """Probe and k-NN on the first scenes of `train`, scored on those of `test` (`held_out=True`).

    Raises ValueError when either has no scene of a single drawing.
    """
    fit = [train.scene(i) for i in range(min(num_train, len(train)))]
    held = [test.scene(i) for i in range(min(num_test, len(test)))]
    classes = sorted({group for scene in (*fit, *held) for group in scene.groups})
    ours, theirs = (embed_scenes(model, x, classes, batch_size=batch_size) for x in (fit, held))
    found = segmentation(ours, theirs, len(classes) + 1, l2=l2)
    voters, asked = (_single(*pair, classes) for pair in ((ours, fit), (theirs, held)))
    return DenseResult(found, knn_accuracy(*voters, *asked, k=k), len(classes) + 1)


def _single(
    images: DenseImages, scenes: Sequence[Scene], classes: Sequence[str]
) -> tuple[Tensor, Tensor]:  # (n, D), (n,)
    """Embeddings of scenes of one drawing, and which it is."""
    rows = [i for i, scene in enumerate(scenes) if len(scene.groups) == 1]
    labels = [classes.index(scenes[i].groups[0]) for i in rows]
    return images.pooled[rows], torch.tensor(labels, dtype=torch.int64)
