"""The inputs of `ssl_step`: a batch with its views, masks and texts, and all weights.

The teacher's weights are the student's with noise: who takes one for the other is found out.
"""

import math
from dataclasses import replace
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2.data.types import PackedImages
from siglip2.locca import LocCaLoss
from siglip2.locca.tasks import TaskText
from siglip2.models.decoder import Decoder, DecoderConfig
from siglip2.models.inputs import VisionInputs
from siglip2.models.presets import Architecture, TextConfig, TowerSize, VisionConfig
from siglip2.models.sequences import uniform
from siglip2.models.siglip2 import Siglip2
from siglip2.self_distillation import HeadConfig, Masks, SslConfig, SslStage, Views, draw_masks
from siglip2.self_distillation.config import SIZE_FACTORS
from siglip2.self_distillation.views import local_side
from siglip2.train.task import Siglip2Task

from .ops import locca_step
from .plain_decoder import OrderedTexts, PaddedTexts
from .plain_texts import ordered_texts, padded_texts
from .plain_towers import PlainViews

PATCH_SIZE = 16
HEADS = {768: (2048, 256), 1152: (2048, 256)}  # hidden width and bottleneck by the tower's width
SCALARS = ("model.log_scale", "model.bias")
CENTRES = ("ssl.distillation.centre", "ssl.masked.centre")
# Weight of the views' losses at other widths: their gradients are then as large as the words'. If
# they are much smaller, LayerNorm on a CPU loses them in a packed pass, since it sums in bfloat16.
SMALL_FACTOR = 2.0
NOISE = 0.1  # of the teacher's weights, by their own deviation


class Sizes(NamedTuple):
    """A shape of the case, hashable."""

    B: int
    N: int
    D: int
    depth: int
    V: int
    K: int

    @property
    def tower(self) -> TowerSize:
        return locca_step.config_of(self.D, self.depth, self.V).size

    @property
    def decoder(self) -> DecoderConfig:
        """Half the layers (27 give 13)."""
        return locca_step.config_of(self.D, self.depth // 2, self.V)

    @property
    def vision(self) -> VisionConfig:
        side = PATCH_SIZE * math.isqrt(self.N)
        return VisionConfig(size=self.tower, patch_size=PATCH_SIZE, image_size=side)

    @property
    def head(self) -> HeadConfig:
        hidden, bottleneck = HEADS.get(self.D, (2 * self.D, self.D // 2))
        return HeadConfig(hidden_width=hidden, bottleneck=bottleneck, prototypes=self.K)

    @property
    def ssl(self) -> SslConfig:
        return SslConfig(head=self.head, size_factor=SIZE_FACTORS.get(self.D, SMALL_FACTOR))

    @property
    def local_grid(self) -> int:
        return local_side(self.ssl.views, self.vision) // PATCH_SIZE


class Batch(NamedTuple):
    """The same images, views and texts as ours and as rivals take them."""

    sizes: Sizes
    dtype: torch.dtype  # of activations
    text: Tensor  # (B, L) int64
    image: PackedImages  # bytes
    views: Views
    masks: Masks
    task_texts: list[list[TaskText]]  # of each image
    plain: PlainViews
    padded: tuple[PaddedTexts, ...]  # of each task
    ordered: OrderedTexts


class Tensors(NamedTuple):
    """All weights, by their names in `Siglip2Task`."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    centres: dict[str, Tensor]
    # What a step moves, of the teacher and of its centres. Copies that no forward reads, so that
    # every call of every rival computes the same; the bytes are those of the real ones.
    averages: list[Tensor]
    average_centres: list[Tensor]

    def students(self) -> list[Tensor]:
        """Of each of the teacher's weights, the one that it averages."""
        return [self.student[student_name(name)] for name in self.teacher]


def student_name(name: str) -> str:
    """Of a teacher's weight."""
    if name.startswith("ssl.teacher."):
        return name.replace("ssl.teacher.", "model.vision.", 1)
    return name.replace(".teacher.", ".student.", 1)


def build_task(
    sizes: Sizes, dtype: torch.dtype, pack: Literal["all", "branch"] = "all"
) -> Siglip2Task:
    """On the meta device: `functional_call` brings the weights."""
    text = TextConfig(size=sizes.tower, embed_dim=sizes.D, vocab_size=sizes.V)
    config = replace(sizes.ssl, pack=pack)
    with torch.device("meta"):
        model = Siglip2(Architecture(vision=sizes.vision, text=text), dtype=dtype)
        stage = SslStage(config, sizes.vision)
        stage.begin(model.vision)
        return Siglip2Task(model, locca=LocCaLoss(Decoder(sizes.decoder)), ssl=stage)


@cache
def weight_shapes(sizes: Sizes) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Of the student, both scalars apart, and of the teacher."""
    named = build_task(sizes, torch.float32).named_parameters()
    parameters = {name: p for name, p in named if name not in SCALARS}
    student, teacher = (
        {name: p.shape for name, p in parameters.items() if p.requires_grad is is_trained}
        for is_trained in (True, False)
    )
    return student, teacher


def tensors_of(batch: Batch, scalars: Tensor, flat: tuple[Tensor, ...]) -> Tensors:
    """What `make` returned behind the batch, by name."""
    student, teacher = weight_shapes(batch.sizes)
    rest = iter(flat)
    take = lambda names: {name: next(rest) for name in names}
    mine = dict(zip(SCALARS, scalars.unbind(), strict=True)) | take(student)
    return Tensors(mine, take(teacher), take(CENTRES), list(take(teacher).values()), list(rest))


def make(
    *,
    B: int,
    N: int,
    D: int,
    depth: int,
    V: int,
    K: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
) -> list:
    """The batch, log_scale and bias in one tensor, and what `Tensors` names.

    In one tensor, since a relative error of one number says little where it is near 0.
    """
    sizes = Sizes(B, N, D, depth, V, K)
    draw = partial(torch.randn, device=device, generator=generator)
    student_shapes, teacher_shapes = weight_shapes(sizes)
    student = {name: _weight(name, shape, draw) for name, shape in student_shapes.items()}
    teacher = []
    for name, shape in teacher_shapes.items():
        mine = student[student_name(name)]
        teacher.append(mine + NOISE * mine.std() * draw(shape))
    centres = [0.05 * draw(K) for _ in CENTRES]
    scalars = torch.tensor([math.log(10.0), -10.0], device=device)
    trained = [x.requires_grad_() for x in (scalars, *student.values())]
    moved = [x.clone() for x in (*teacher, *centres)]
    batch = _batch(sizes, dtype, torch.device(device), generator)
    return [batch, *trained, *teacher, *centres, *moved]


def _weight(name: str, shape: torch.Size, draw) -> Tensor:
    """Rows that keep activations of unit variance; no zeros, which would hide an error."""
    is_table = name.endswith(("token_embed", "prototypes"))
    x = draw(shape).mul_(1.0 if is_table else shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
    return x.add_(1.0) if "norm" in name and name.endswith("weight") else x


def _batch(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Batch:
    B, N, V, L = sizes.B, sizes.N, sizes.V, locca_step.LENGTH
    side, num_local = sizes.local_grid, sizes.ssl.views.num_local
    integers = partial(torch.randint, device=device, generator=generator)
    width = 3 * PATCH_SIZE**2
    pixels = integers(256, (B * N, width), dtype=torch.uint8)
    whole, local = (
        2 * torch.rand(n, width, device=device, generator=generator) - 1
        for n in (B * N, B * num_local * side**2)
    )
    grids = [[math.isqrt(N)] * 2] * B
    masks = draw_masks(grids, sizes.ssl.mask_share, generator=generator)
    grid_hw = torch.tensor(grids, dtype=torch.int32)
    seqs = uniform(B, N, device)
    local_hw = torch.full((B * num_local, 2), side, dtype=torch.int32)
    views = Views(
        VisionInputs(whole, grid_hw, seqs),
        VisionInputs(local, local_hw, uniform(B * num_local, side**2, device)),
    )
    texts = locca_step.texts_of(B, V)
    return Batch(
        sizes,
        dtype,
        integers(V, (B, L)),
        PackedImages(pixels, grid_hw, seqs.cu_seqlens, N),
        views,
        masks,
        texts,
        _plain_views(pixels.float() / 127.5 - 1, views, masks, B),
        tuple(padded_texts(of_task, L, V, str(device)) for of_task in zip(*texts, strict=True)),
        ordered_texts(texts, N, V, str(device)),
    )


def _plain_views(
    original: Tensor,  # (B*N, P*P*C)
    views: Views,
    masks: Masks,
    B: int,
) -> PlainViews:
    whole, local = views.global_view.patches, views.local_views.patches
    num_local, N = len(views.local_views.grid_hw), len(whole) // B
    unseen = torch.zeros_like(masks.mask), masks.mask.new_zeros(len(local))
    lengths = torch.tensor([N] * (2 * B) + [len(local) // num_local] * num_local)
    return PlainViews(
        original.unflatten(0, (B, -1)),
        whole.unflatten(0, (B, -1)),
        local.unflatten(0, (num_local, -1)),
        masks.mask.unflatten(0, (B, -1)),
        masks.index,
        torch.cat([original, whole, local]),
        torch.cat([unseen[0], masks.mask, unseen[1]]),
        F.pad(lengths.cumsum(0), (1, 0)).int().to(original.device),
    )
