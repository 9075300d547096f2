"""What one update takes: lists of tensors, and the numbers that shape it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Number = float | Tensor  # of one element


class Tensors(NamedTuple):
    """Lists of one length. Entries of the last three may be None: that parameter has none."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]  # of one element each: updates so far
    teachers: Sequence[Tensor | None]
    copies: Sequence[Tensor | None]
    teacher_copies: Sequence[Tensor | None]


class Settings(NamedTuple):
    lr: Number
    beta1: float
    beta2: float
    eps: float
    weight_decay: Number
    momentum: Number | None  # of the teacher; None where there is none
    clip_coefficient: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


_LIKE_PARAMS = ("grads", "exp_avgs", "exp_avg_sqs", "teachers", "copies", "teacher_copies")


def check(tensors: Tensors, settings: Settings) -> None:
    """Raises ValueError."""
    params = tensors.params
    for name, values in tensors._asdict().items():
        if len(values) != len(params):
            raise ValueError(f"need one of {name} a parameter: {len(params)}; got {len(values)}")
    for name in _LIKE_PARAMS:
        for p, x in zip(params, getattr(tensors, name), strict=True):
            if x is not None and (x.shape != p.shape or x.device != p.device):
                need, got = (f"{tuple(t.shape)} on {t.device}" for t in (p, x))
                raise ValueError(f"need {name} like their parameters, {need}; got {got}")
    for teacher, copy in zip(tensors.teachers, tensors.teacher_copies, strict=True):
        if copy is not None and teacher is None:
            raise ValueError("need a teacher where teacher_copies has an entry; got None")
    if settings.momentum is None and any(x is not None for x in tensors.teachers):
        raise ValueError("need momentum with teachers; got None")
    for name in ("clip_coefficient", "grad_scale", "found_inf"):
        x = getattr(settings, name)
        if x is not None and params and x.device != params[0].device:
            raise ValueError(f"need {name} on {params[0].device} as parameters; got {x.device}")
    for name in ("beta1", "beta2"):
        value = getattr(settings, name)
        if isinstance(value, Tensor) or not 0 <= value < 1:
            raise ValueError(f"need {name}: a number of at least 0 and below 1; got {value}")
