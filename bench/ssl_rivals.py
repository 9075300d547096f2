"""A step of the SSL phase out of public parts: what `ssl_step` compares ours with."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from siglip2.models.presets import TowerSize
from siglip2_kernels.sigmoid_loss import reference

from .plain_decoder import (
    OrderedTexts,
    PaddedTexts,
    decode_packed,
    decode_padded,
    packed_loss,
    padded_loss,
)
from .plain_layers import Attend, Weights, cast, part, torch_varlen
from .plain_towers import Seen, distil, read, see_apart, see_packed, teach
from .ssl_batch import CENTRES, Batch, Sizes, Tensors, tensors_of

# Averages, what they follow, and how far they go
Ema = Callable[[list[Tensor], list[Tensor], float], None]


def separate(*, compiled: bool = False) -> Callable[..., Tensor]:
    """A pass for each kind of view and each task, padded."""
    return _step(see_apart, _caption_padded, lambda batch: batch.padded, _ema, compiled=compiled)


def composition(*, compiled: bool = True) -> Callable[..., Tensor]:
    """The best of public parts: views and texts packed, `torch.nn.attention.varlen`, compiled."""
    attend = torch_varlen()
    see, caption = (partial(f, attend=attend) for f in (see_packed, _caption_packed))
    ema = torch._foreach_lerp_
    return _step(see, caption, lambda batch: batch.ordered, ema, compiled=compiled)


def _step(
    see: Callable[..., Seen],
    caption: Callable[..., Tensor],
    texts_of: Callable[[Batch], OrderedTexts | tuple[PaddedTexts, ...]],
    ema: Ema,
    *,
    compiled: bool,
) -> Callable[..., Tensor]:
    compile_ = partial(torch.compile, dynamic=False) if compiled else lambda f: f
    see, caption, text_tower, teacher, head, contrast = map(
        compile_, (see, caption, read, teach, distil, _contrast)
    )

    def run(batch: Batch, scalars: Tensor, *flat: Tensor) -> Tensor:
        w, sizes = tensors_of(batch, scalars, flat), batch.sizes
        dtype = torch.float64 if scalars.dtype == torch.float64 else batch.dtype
        txt = text_tower(part(w.student, "model.text."), batch.text, sizes.tower, dtype)
        taught = teacher(part(w.teacher, "ssl.teacher."), batch.plain, sizes.tower, dtype)
        vision, mask_token = part(w.student, "model.vision."), w.student["ssl.mask_token.weight"]
        seen = see(vision, mask_token, batch.plain, sizes.tower, dtype)
        decoder = part(w.student, "locca.decoder.")
        loss = contrast(seen.pooled, txt, scalars)
        loss = loss + caption(decoder, seen.tokens, texts_of(batch), sizes.decoder.size)
        distilled, means = _distilled(head, w, seen, taught, sizes)
        _move(ema, w, means, sizes)
        return loss + distilled

    return run


def _contrast(img: Tensor, txt: Tensor, scalars: Tensor) -> Tensor:
    """The whole matrix of pairs."""
    return reference.sigmoid_loss(img, txt, *scalars.unbind(), normalize=True)


def _caption_padded(
    w: Weights, vision: Tensor, texts: tuple[PaddedTexts, ...], size: TowerSize
) -> Tensor:
    w = cast(w, vision.dtype)
    hidden = [
        decode_padded(w, task.ids, task.allowed, vision, size.depth, size.num_heads)
        for task in texts
    ]
    return sum(padded_loss(w, x, task.target) for x, task in zip(hidden, texts, strict=True))


def _caption_packed(
    w: Weights, vision: Tensor, texts: OrderedTexts, size: TowerSize, *, attend: Attend
) -> Tensor:
    w, vision = cast(w, vision.dtype), vision.flatten(0, 1)
    hidden = decode_packed(w, texts, vision, size.depth, size.num_heads, attend)
    return packed_loss(w, hidden, texts)


def _distilled(
    head: Callable[..., tuple[Tensor, Tensor]],
    w: Tensors,
    seen: Seen,
    taught: tuple[Tensor, Tensor],
    sizes: Sizes,
) -> tuple[Tensor, list[Tensor]]:
    """Both losses with their weights, and the teacher's mean logits of each."""
    config = sizes.ssl
    temps = (config.student_temp, config.teacher_temp)
    weights = (config.distillation_weight, config.masked_weight)
    total, means = 0.0, []
    for name, centre, x, said, weight in zip(
        ("image", "patch"), CENTRES, (seen.local, seen.hidden), taught, weights, strict=True
    ):
        student = part(w.student, f"ssl.heads.{name}.student.")
        teacher = part(w.teacher, f"ssl.heads.{name}.teacher.")
        loss, mean = head(student, teacher, w.centres[centre], x, said, temps)
        total = total + config.factor(sizes.D) * weight * loss
        means.append(mean)
    return total, means


@torch.no_grad()
def _move(ema: Ema, w: Tensors, means: list[Tensor], sizes: Sizes) -> None:
    ema(w.averages, w.students(), 1 - sizes.ssl.ema_momentum)
    ema(w.average_centres, means, 1 - sizes.ssl.centre_momentum)


def _ema(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """As DINOv2: in two passes."""
    torch._foreach_mul_(averages, 1 - weight)
    torch._foreach_add_(averages, values, alpha=weight)
