"""The rivals of `ssl_step` compute what ours do, those for GPUs alone included."""

import pytest
import torch
import torch.nn.functional as F

from siglip2_bench import ops, ssl_rivals
from siglip2_bench.case import Rival, make_inputs
from siglip2_bench.check import Checker
from siglip2_bench.ssl_batch import Sizes, student_name, tensors_of, weight_shapes

CASE = ops.load("ssl_step")
SHAPE = {"B": 3, "N": 16, "D": 64, "depth": 2, "V": 300, "K": 50}


def attend_each(q, k, v, cu_q, cu_k, longest_q, longest_k, is_causal):
    """`varlen_attn`, sequence by sequence."""
    parts = []
    for i in range(len(cu_q) - 1):
        here = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        assert here[0].stop - here[0].start <= longest_q
        assert here[1].stop - here[1].start <= longest_k
        heads = (x.transpose(0, 1) for x in (q[here[0]], k[here[1]], v[here[1]]))
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=is_causal).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def composition(monkeypatch):
    monkeypatch.setattr(ssl_rivals, "torch_varlen", lambda: attend_each)
    return Rival(build=lambda: ssl_rivals.composition(compiled=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_packed_rival_is_right(composition, dtype):
    checker = Checker(CASE, dtype=dtype, device="cpu")
    assert checker.accuracy(composition).units <= composition.max_error


@pytest.mark.parametrize("name", ["eager", "composition", "siglip2", "siglip2-branch"])
def test_a_step_moves_the_averages_alone(name, composition):
    rival = composition if name == "composition" else CASE.rivals[name]
    inputs = make_inputs(CASE, SHAPE, dtype=torch.float32, device="cpu")
    before = [x.detach().clone() for x in inputs[1:]]
    rival.build()(*inputs)
    then, now = (tensors_of(inputs[0], *_split(flat)) for flat in (before, inputs[1:]))
    ssl = Sizes(**SHAPE).ssl
    for i, teacher in enumerate(then.teacher):
        old, student = then.averages[i], then.student[student_name(teacher)]
        torch.testing.assert_close(now.averages[i], old.lerp(student, 1 - ssl.ema_momentum))
    for name in ("student", "teacher", "centres"):
        assert_equal(getattr(then, name), getattr(now, name))


@pytest.mark.parametrize("name", ["siglip2", "siglip2-branch"])
def test_ours_is_the_same_again(name):
    inputs = make_inputs(CASE, SHAPE, dtype=torch.float32, device="cpu")
    step = CASE.rivals[name].build()
    with torch.no_grad():
        assert step(*inputs) == step(*inputs)


def test_rivals_move_centres_by_the_teachers_mean_logits(composition):
    moved = []
    for rival in (CASE.rivals["eager"], composition):
        inputs = make_inputs(CASE, SHAPE, dtype=torch.float32, device="cpu")
        rival.build()(*inputs)
        moved.append(tensors_of(inputs[0], *_split(inputs[1:])).average_centres)
        unmoved = tensors_of(inputs[0], *_split(inputs[1:])).centres.values()
        assert all(not torch.equal(a, b) for a, b in zip(moved[-1], unmoved, strict=True))
    torch.testing.assert_close(*moved)


def test_who_takes_the_student_for_its_teacher_is_wrong():
    eager = CASE.rivals["eager"].build()

    def confused(batch, scalars, *flat):
        student, teacher = weight_shapes(batch.sizes)
        flat = list(flat)
        mine = dict(zip(student, flat, strict=False))
        flat[len(student) : len(student) + len(teacher)] = [
            mine[student_name(name)].detach() for name in teacher
        ]
        return eager(batch, scalars, *flat)

    checker = Checker(CASE, dtype=torch.float32, device="cpu")
    assert checker.accuracy(Rival(build=lambda: confused)).units > 1000


def test_flops_are_those_of_the_stages():
    """Of a B/16, an image: 833 G before padding is taken from texts, which are 40 % full."""
    flops = CASE.cost(**CASE.shapes[1], dtype=torch.bfloat16)["full"].flops / 64
    assert 0.70 * 833e9 < flops < 0.9 * 833e9


def _split(flat):
    return flat[0], tuple(flat[1:])


def assert_equal(old: dict, new: dict):
    assert old.keys() == new.keys()
    for name, x in old.items():
        assert torch.equal(x, new[name]), name
