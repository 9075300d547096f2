import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from prototype_inputs import (
    MAX_D,
    SHAPES,
    TEMPS,
    make_bias,
    make_index,
    make_options,
    make_prototypes,
)

from compare import assert_no_worse
from siglip2_kernels import prototype_cross_entropy
from siglip2_kernels.prototype_cross_entropy import reference
from strategies import RUNNERS, runners_and_dtypes

ALL_RUNNERS = [p for p in RUNNERS if "cublas" not in p.id]
ALL_DTYPES = [p for p in runners_and_dtypes() if "cublas" not in p.id]
OPTIONS = list(make_options(3, 3))
NAMES = ("loss", "dstudent", "dweight")


def value_and_grads(fn, inputs, dtype=None, dloss=1.0, **options):
    """Of student, student_weight, teacher and teacher_weight."""
    inputs = [t.detach().to(dtype or t.dtype) for t in inputs]
    learned = [t.requires_grad_() for t in inputs[:2]]
    loss = fn(*inputs, **TEMPS | options)
    return [loss.detach(), *torch.autograd.grad(loss, learned, torch.full_like(loss, dloss))]


def student_part(student, student_weight, *inputs, student_temp, teacher_temp, **options):
    """The loss without its mean logit: what the teacher's part of each gradient cancels with."""
    counts = options.get("valid_count", torch.tensor(len(student))).item()
    weight = options.get("token_weight", torch.full((len(student),), 1 / max(counts, 1)))
    weight_norm = options.get("weight_norm", False)
    s = reference.prototype_logits(student, student_weight, student_temp, weight_norm=weight_norm)
    return (s.logsumexp(1) * weight.to(s))[:counts].sum()


def check_against_reference(inputs, dtype, backend, dloss=1.0, largest_logit=25.0, **options):
    chunk = {"chunk_tokens": options.pop("chunk_tokens", 50)}
    evaluate = partial(value_and_grads, inputs=inputs, dloss=dloss, **options)
    gold = evaluate(reference.prototype_cross_entropy, dtype=torch.float64)
    eager = evaluate(reference.prototype_cross_entropy)
    actual = evaluate(prototype_cross_entropy, backend=backend, **chunk)
    parts = evaluate(student_part, dtype=torch.float64)
    for name, a, e, g, part in zip(NAMES, actual, eager, gold, parts, strict=True):
        # Student's and teacher's parts cancel; a rounding of a logit is one of its probability.
        size = part.abs().max() + (part - g).abs().max()
        terms = largest_logit if name == "loss" else largest_logit * size
        if backend == "triton" and dtype.itemsize == 2 and name != "loss":
            # Probabilities are rounded as operands, on either side.
            rounding = torch.finfo(dtype).eps / 2
            terms = max(terms, size * rounding / (16 * torch.finfo(torch.float32).eps))
        assert_no_worse(name, a, e, g, dtype, terms=float(terms))


def skip_what_triton_lacks(backend, D):
    if backend == "triton" and D > MAX_D:
        pytest.skip(f"the Triton design takes bottlenecks of at most {MAX_D}")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), ALL_DTYPES)
def test_matches_reference(backend, device, dtype, shape, options):
    skip_what_triton_lacks(backend, shape[2])
    inputs = make_prototypes(*shape, dtype, device)
    options = make_options(*shape[:2], device)[options]
    check_against_reference(inputs, dtype, backend, dloss=3.0, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("S", [3, 70, 300])
@pytest.mark.parametrize(("backend", "device", "dtype"), ALL_DTYPES)
def test_views_share_teacher_rows(backend, device, dtype, S, options):
    T, K, D = 131, 70, 40
    inputs = make_prototypes(T, K, D, dtype, device, S=S)
    check_against_reference(inputs, dtype, backend, **make_options(T, K, device, S)[options])


@pytest.mark.parametrize(("backend", "device", "dtype"), ALL_DTYPES)
def test_rows_of_any_length_match_reference(backend, device, dtype):
    # Logits of 400 and more, biases of 50: far beyond exp's range without a maximum.
    inputs = make_prototypes(131, 200, 40, dtype, device)
    inputs = [inputs[0] * 6, *inputs[1:2], inputs[2] * 20, *inputs[3:]]
    bias = make_bias(200, device, std=50.0)
    check_against_reference(inputs, dtype, backend, teacher_bias=bias, largest_logit=700.0)


@pytest.mark.parametrize(("backend", "device", "dtype"), ALL_DTYPES)
def test_float16_tokens_of_a_long_batch_do_not_underflow(backend, device, dtype):
    inputs = make_prototypes(20, 50, 16, dtype, device)
    weight = torch.full((20,), 2.0**-20, device=device)
    check_against_reference(inputs, dtype, backend, dloss=2.0**20, token_weight=weight)


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_a_prototype_may_be_left_out(backend, device):
    inputs = make_prototypes(20, 150, 16, torch.float32, device)
    bias = make_bias(150, device)
    bias[:130] = -torch.inf
    check_against_reference(inputs, torch.float32, backend, teacher_bias=bias)


@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
@pytest.mark.parametrize("case", ["no-token", "no-count", "no-weight", "no-view"])
def test_without_a_counting_token_everything_is_zero(backend, device, case):
    T = 0 if case == "no-token" else 6
    inputs, options = make_prototypes(T, 9, 16, torch.float32, device), {}
    if case == "no-count":
        options["valid_count"] = torch.tensor(0, device=device)
    if case == "no-weight":
        options["token_weight"] = torch.zeros(T, device=device)
    if case == "no-view":
        inputs[0] = inputs[0][:0].detach().requires_grad_()
        options["teacher_index"] = torch.zeros(0, dtype=torch.int64, device=device)
    results = value_and_grads(prototype_cross_entropy, inputs, backend=backend, **options)
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_the_only_prototype_is_certain(backend, device):
    inputs = make_prototypes(5, 1, 16, torch.float32, device)
    loss, dstudent, dweight = value_and_grads(prototype_cross_entropy, inputs, backend=backend)
    few = 100 * torch.finfo(torch.float32).eps
    assert max(loss.abs(), dstudent.abs().max(), dweight.abs().max()) <= few


@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_rows_past_the_count_are_never_used(backend, device):
    inputs = make_prototypes(150, 70, 16, torch.float32, device)
    few = [inputs[0][:90], inputs[1], inputs[2][:90], inputs[3]]
    expected = value_and_grads(prototype_cross_entropy, few, backend=backend)
    inputs = [t.detach().clone() for t in inputs]
    inputs[0][90:], inputs[2][90:] = torch.nan, torch.inf
    if backend == "reference":  # whose backward would multiply NaN by 0
        inputs[0][90:], inputs[2][90:] = 1e30, -1e30
    for index in (None, torch.arange(150, device=device).clamp(max=89)):
        count = torch.tensor(90, device=device, dtype=torch.int32)
        options = {"valid_count": count, "teacher_index": index, "backend": backend}
        teacher = inputs[2] if index is None else few[2]
        ours = [inputs[0], inputs[1], teacher, inputs[3]]
        actual = value_and_grads(prototype_cross_entropy, ours, **options)
        assert (actual[1][90:] == 0).all()
        actual[1] = actual[1][:90]
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            assert_no_worse(name, a, e, e.double(), torch.float32, terms=25.0 * (name == "loss"))


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_views_cost_what_their_own_teacher_rows_would(backend, device):
    inputs = make_prototypes(131, 70, 40, torch.float32, device, S=20)
    index = make_index(131, 20, device)
    shared = value_and_grads(
        prototype_cross_entropy, inputs, teacher_index=index.int(), backend=backend
    )
    inputs[2] = inputs[2][index]
    own = value_and_grads(prototype_cross_entropy, inputs, backend=backend)
    for name, a, e in zip(NAMES, shared, own, strict=True):
        assert_no_worse(name, a, e, e.double(), torch.float32, terms=25.0 * (name == "loss"))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_torch_cross_entropy_in_float64(backend):
    student, weight, teacher, teacher_weight = make_prototypes(40, 11, 8, torch.float64)
    centre = make_bias(11).double()
    p = F.softmax((teacher @ teacher_weight.T - centre) / 0.04, 1)
    gold = F.cross_entropy(student @ weight.T / 0.1, p)
    gold = [gold, *torch.autograd.grad(gold, (student, weight))]
    loss = prototype_cross_entropy(
        *(student, weight, teacher, teacher_weight),
        **TEMPS,
        teacher_bias=-centre / 0.04,
        backend=backend,
    )
    actual = [loss, *torch.autograd.grad(loss, (student, weight))]
    for a, g in zip(actual, gold, strict=True):
        torch.testing.assert_close(a, g, rtol=0, atol=1e3 * torch.finfo(g.dtype).eps)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend, options):
    student, weight, teacher, teacher_weight = make_prototypes(7, 5, 3, torch.float64, S=4)
    options = TEMPS | make_options(7, 5, S=4)[options] | {"backend": backend, "chunk_tokens": 3}
    options["student_temp"] = 0.5
    fn = lambda z, w: prototype_cross_entropy(z, w, teacher, teacher_weight, **options)
    assert torch.autograd.gradcheck(fn, (student, weight))


def test_reference_is_the_double_loop():
    inputs = [t.detach() for t in make_prototypes(4, 3, 2, torch.float64)]
    student, weight, teacher, teacher_weight = inputs
    bias, total = make_bias(3).double(), 0.0
    for t in range(4):
        z = [float(teacher[t] @ teacher_weight[k]) / 0.04 + float(bias[k]) for k in range(3)]
        s = [float(student[t] @ weight[k]) / 0.1 for k in range(3)]
        z, s = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (z, s))
        total -= sum(p * math.log(q) for p, q in zip(z, s, strict=True)) / 4
    loss = reference.prototype_cross_entropy(*inputs, **TEMPS, teacher_bias=bias)
    assert float(loss) == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_the_teacher_gets_no_gradient(backend, device):
    inputs = [t.detach().requires_grad_() for t in make_prototypes(9, 7, 16, torch.float32, device)]
    bias = make_bias(7, device).requires_grad_()
    loss = prototype_cross_entropy(*inputs, **TEMPS, teacher_bias=bias, backend=backend)
    loss.backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert inputs[2].grad is inputs[3].grad is bias.grad is None
