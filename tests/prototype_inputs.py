"""Bottlenecks, prototypes, indices and biases for tests of the prototype cross entropy."""

import torch
import torch.nn.functional as F

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}
# (T, K, D). The tiles of all backends divide 128; the ragged sizes do not.
SHAPES = {
    "one-token": (1, 5, 16),
    "one-tile": (128, 128, 64),
    "ragged": (131, 259, 40),
    "few-prototypes": (150, 3, 72),
    "wide": (5, 200, 1152),
}
# Of a Triton kernel, whose accumulator holds a row of the bottleneck.
MAX_D = 512


def make_prototypes(T, K, D, dtype, device="cpu", S=None):
    """student, its weight, teacher, its weight: unit rows, students near their teachers."""
    g = torch.Generator().manual_seed(0)
    teacher = F.normalize(torch.randn(T if S is None else S, D, generator=g), dim=1)
    weight = F.normalize(torch.randn(K, D, generator=g), dim=1)
    near = weight[torch.randint(0, K, (len(teacher),), generator=g)]
    teacher = F.normalize(teacher + near, dim=1)
    like = teacher[make_index(T, S)] if S is not None else teacher
    student = F.normalize(like + 1.5 * torch.randn(T, D, generator=g) / D**0.5, dim=1)
    student_weight = F.normalize(weight + 0.5 * torch.randn(K, D, generator=g) / D**0.5, dim=1)
    made = [x.to(device, dtype) for x in (student, student_weight, teacher, weight)]
    return [made[0].requires_grad_(), made[1].requires_grad_(), *made[2:]]


def make_index(T, S, device="cpu"):
    """Teacher rows in no order, some of several students, some of none."""
    index = torch.randint(0, S, (T,), generator=torch.Generator().manual_seed(3))
    return (index // 2 * 2).to(device)


def make_bias(K, device="cpu", std=2.0):
    return (std * torch.randn(K, generator=torch.Generator().manual_seed(4))).to(device)


def make_token_weight(T, device="cpu"):
    """As of patches weighted by their images' masks, some of weight 0."""
    weight = torch.rand(T, generator=torch.Generator().manual_seed(2)) / T
    weight[1::7] = 0
    return weight.to(device)


def make_options(T, K, device="cpu", S=None):
    """Name -> keyword arguments, with an index where S is given."""
    index = {} if S is None else {"teacher_index": make_index(T, S, device)}
    bias, weight = make_bias(K, device), make_token_weight(T, device)
    count = torch.tensor(max(T * 2 // 3, 1), device=device)
    return {
        "plain": index,
        "bias-weights": index | {"teacher_bias": bias, "token_weight": weight},
        "count": index | {"valid_count": count, "teacher_bias": bias},
        "normed": index | {"weight_norm": True},
    }
