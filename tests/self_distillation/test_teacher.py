"""Head and teacher against float64 arithmetic written out here."""

import copy

import pytest
import torch
from torch import nn

from siglip2.config import OptimConfig
from siglip2.self_distillation import (
    HeadConfig,
    PrototypeHead,
    TaughtHead,
    cosine_momentum,
    ema_update,
    fixed_momentum,
)
from siglip2.self_distillation.teacher import Pairs, frozen, parameter_pairs
from siglip2.train.optim import adamw

EPS = torch.finfo(torch.float64).eps
SMALL = HeadConfig(depth=3, hidden_width=24, bottleneck=8, prototypes=11)


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


@pytest.mark.parametrize("depth", [1, 3])
def test_head_equals_its_definition(depth):
    config = HeadConfig(depth=depth, hidden_width=24, bottleneck=8, prototypes=11)
    head = randomized(PrototypeHead(16, config)).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    h = x
    for i, layer in enumerate(head.layers):
        h = h @ layer.weight.T + layer.bias
        if i + 1 < depth:
            h = h * (1 + torch.erf(h / 2**0.5)) / 2
    wanted = h / h.square().sum(1, keepdim=True).sqrt()
    found = head(x)
    assert (found.z - wanted).abs().max() <= 64 * EPS
    assert found.prototypes is head.prototypes


def test_head_has_the_sizes_of_its_configuration():
    head = PrototypeHead(768, HeadConfig(prototypes=100))
    assert [tuple(layer.weight.shape) for layer in head.layers] == [
        (2048, 768),
        (2048, 2048),
        (256, 2048),
    ]
    assert head.prototypes.shape == (100, 256)
    assert HeadConfig().prototypes == 65_536
    assert head(torch.randn(2, 768, dtype=torch.bfloat16)).z.dtype is torch.bfloat16


def test_a_new_head_teaches_what_it_says_and_takes_no_gradient():
    head = TaughtHead(16, SMALL)
    x = torch.randn(5, 16)
    assert torch.equal(head(x).z, head.teach(x).z)
    assert not head.teach(x).z.requires_grad
    assert all(not p.requires_grad for p in head.teacher.parameters())
    in_optimiser = {id(p) for g in adamw(head, OptimConfig()).param_groups for p in g["params"]}
    assert in_optimiser == {id(p) for p in head.student.parameters()}


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9996, 1.0])
def test_teacher_follows_float64_arithmetic(momentum):
    """N roundings of float32: each step rounds what it adds, and the sum."""
    head, num_steps = randomized(TaughtHead(16, SMALL)), 200
    wanted = [p.double() for p in head.teacher.parameters()]
    sizes = [p.abs().max() for p in wanted]
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        with torch.no_grad():
            for p in head.student.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        ema_update(head.pairs(), momentum)
        for i, p in enumerate(head.student.parameters()):
            wanted[i] = momentum * wanted[i] + (1 - momentum) * p.detach().double()
            sizes[i] = torch.maximum(sizes[i], p.abs().max())
    for p, gold, size in zip(head.teacher.parameters(), wanted, sizes, strict=True):
        assert p.dtype is torch.float32
        assert (p.double() - gold).abs().max() <= num_steps * torch.finfo(torch.float32).eps * size


def test_teacher_of_a_bfloat16_student_moves():
    student = nn.Linear(4, 4).bfloat16()
    teacher = frozen(copy.deepcopy(student))
    before = teacher.weight.clone()
    with torch.no_grad():
        student.weight += 1
    ema_update(parameter_pairs(teacher, student), 0.9996)
    torch.testing.assert_close(
        teacher.weight, before + 0.0004 * (student.weight.float() - before), rtol=0, atol=2e-7
    )
    assert not torch.equal(teacher.weight, before)


def test_pairs_are_views_of_the_parameters():
    head = randomized(TaughtHead(16, SMALL))
    pairs = head.pairs()
    assert len(pairs.teacher) == len(pairs.student) == 7
    pairs.teacher[0].fill_(3)
    assert (head.teacher.prototypes == 3).all()
    head.begin()
    assert torch.equal(head.teacher.prototypes, head.student.prototypes)
    ema_update(Pairs([], []), 0.5)  # a stage whose heads are off


def test_momentum_is_a_function_of_examples_seen():
    assert [fixed_momentum(0.966)(n) for n in (0, 10**9)] == [0.966] * 2
    momentum = cosine_momentum(0.9, 1.0, start=100, end=300)
    found = [momentum(n) for n in (0, 100, 150, 200, 300, 500)]
    assert found == pytest.approx([0.9, 0.9, 0.9 + 0.05 * (1 - 0.5**0.5), 0.95, 1.0, 1.0])


def test_wrong_input_is_one_clear_error():
    head = TaughtHead(16, SMALL)
    with pytest.raises(ValueError, match="need an EMA momentum from 0 to 1; got 2"):
        ema_update(head.pairs(), 2)
    with pytest.raises(ValueError, match="only one of them has bias"):
        parameter_pairs(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"weight is \(2, 2\) here and \(2, 3\) there"):
        parameter_pairs(nn.Linear(2, 2), nn.Linear(3, 2))


def test_a_state_dict_brings_the_teacher_back():
    head = randomized(TaughtHead(16, SMALL))
    other = TaughtHead(16, SMALL)
    other.load_state_dict(head.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(other.teach(x).z, head.teach(x).z)
    assert not torch.equal(head.teach(x).z, head(x).z)
