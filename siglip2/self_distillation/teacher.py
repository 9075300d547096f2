"""A teacher that is the moving average of its student.

    teacher <- teacher + (1 - momentum) (student - teacher)    after the optimiser step

In float32 whatever the student computes in: at momentum 0.9996 a bfloat16 average would not move.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Momentum = Callable[[float], float]  # of examples seen


class Pairs(NamedTuple):
    """Parameters that belong together, by position; of sharded ones this rank's part."""

    teacher: list[Tensor]
    student: list[Tensor]

    def joined(self, other: "Pairs") -> "Pairs":
        return Pairs(self.teacher + other.teacher, self.student + other.student)


def frozen(module: nn.Module) -> nn.Module:
    """`module` as a teacher: no gradients, at least float32."""
    for parameter in module.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return module.eval()


def parameter_pairs(teacher: nn.Module, student: nn.Module) -> Pairs:
    """Raises ValueError when the modules differ in names, shapes or sharding."""
    taught, mine = dict(teacher.named_parameters()), dict(student.named_parameters())
    if taught.keys() != mine.keys():
        odd = sorted(taught.keys() ^ mine.keys())[:3]
        raise ValueError(
            f"need a teacher with its student's parameters; only one of them has {', '.join(odd)}"
        )
    pairs = Pairs([], [])
    for name, parameter in taught.items():
        part, other = _local(parameter), _local(mine[name])
        if part.shape != other.shape:
            raise ValueError(
                f"need a teacher shaped and sharded as its student; {name} is"
                f" {tuple(part.shape)} here and {tuple(other.shape)} there. Give both the same"
                " fully_shard calls"
            )
        pairs.teacher.append(part)
        pairs.student.append(other)
    return pairs


def _local(parameter: Tensor) -> Tensor:
    """A sharded parameter's part on this rank, a whole one itself; without its history."""
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@torch.no_grad()
def copy_parameters(pairs: Pairs) -> None:
    """Teachers become their students."""
    for taught, mine in zip(*pairs, strict=True):
        taught.copy_(mine)


@torch.no_grad()
def ema_update(pairs: Pairs, momentum: float) -> None:
    """One step of the average, in as many launches as there are kinds of tensors.

    Raises ValueError for a momentum outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"need an EMA momentum from 0 to 1; got {momentum}")
    student = [m.to(t.dtype) for t, m in zip(*pairs, strict=True)]
    if student:
        torch._foreach_lerp_(pairs.teacher, student, 1 - momentum)


def fixed_momentum(momentum: float) -> Momentum:
    """SILC's: the teacher keeps learning from its student's other losses to the end."""
    return lambda examples: momentum


def cosine_momentum(first: float, last: float, *, start: float, end: float) -> Momentum:
    """DINO's: from `first` at `start` examples to `last` at `end`."""

    def momentum(examples: float) -> float:
        share = min(max((examples - start) / max(end - start, 1), 0.0), 1.0)
        return last - (last - first) * (1 + math.cos(math.pi * share)) / 2

    return momentum
