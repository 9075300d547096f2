import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels import pairwise_sigmoid_loss_sums, sigmoid_loss
from siglip2_kernels._core.backend import INTERPRET
from siglip2_kernels.sigmoid_loss import _chunked, reference
from strategies import (
    PAIR_SHAPES,
    RUNNERS,
    TEMPERATURES,
    make_inputs,
    make_pairs,
    runners_and_dtypes,
)

NAMES = ("loss", "dimg", "dtxt", "dlog_scale", "dbias")


def value_and_grads(fn, inputs, dtype=None, dloss=1.0):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = fn(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, dloss))]


def cancelling_terms(inputs, pairs, reduction):
    """Sums of the absolute terms of dlog_scale and dbias, in float64."""
    img, txt, log_scale, bias = (x.detach().double() for x in inputs)
    scaled = log_scale.exp() * img @ txt.T
    z = (scaled + bias).requires_grad_()
    zero, identity = torch.zeros_like(bias), torch.eye(len(txt), dtype=z.dtype, device=z.device)
    loss = reference.sigmoid_loss(z, identity, zero, zero, reduction=reduction, **pairs)
    (g,) = torch.autograd.grad(loss, z)
    return {"dlog_scale": float((g * scaled).abs().sum()), "dbias": float(g.abs().sum())}


def check_against_reference(inputs, pairs, dtype, backend, reduction="mean", dloss=1.0):
    def evaluate(fn, dtype=None, **kwargs):
        call = lambda *a: fn(*a, reduction=reduction, **pairs, **kwargs)
        return value_and_grads(call, inputs, dtype, dloss)

    gold = evaluate(reference.sigmoid_loss, torch.float64)
    eager = evaluate(reference.sigmoid_loss)
    actual = evaluate(sigmoid_loss, backend=backend)
    terms = cancelling_terms(inputs, pairs, reduction)
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, dtype, terms=dloss * terms.get(name, 0.0))


def set_chunk_elements(monkeypatch, elements):
    """Triton's chunks are whole tiles: 128 rows at least."""
    monkeypatch.setitem(_chunked.MAX_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(_chunked, "MAX_ELEMENTS_DEVICE", elements)
    if INTERPRET or torch.cuda.is_available():
        from siglip2_kernels.sigmoid_loss import _triton

        monkeypatch.setattr(_triton, "MAX_ELEMENTS", elements)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["diagonal", "ids", "weighted"])
@pytest.mark.parametrize("shape", PAIR_SHAPES.values(), ids=PAIR_SHAPES.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_matches_reference(backend, device, dtype, shape, kind, temperature, monkeypatch):
    set_chunk_elements(monkeypatch, 5000)
    B, M, D = shape
    if kind == "diagonal":
        M = B
    inputs = make_inputs(B, M, D, dtype, device, temperature)
    check_against_reference(inputs, make_pairs(kind, B, M, device), dtype, backend)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_sum_reduction_is_the_specification_without_the_division(backend, device):
    inputs = make_inputs(40, 30, 16, torch.float32, device)
    pairs = make_pairs("weighted", 40, 30, device)
    check_against_reference(inputs, pairs, torch.float32, backend, reduction="sum")


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_float16_loss_scaling_reaches_gradients_before_they_are_rounded(backend, device):
    # Unscaled, every gradient here is below float16's smallest number.
    inputs = make_inputs(140, 140, 64, torch.float16, device)
    pairs = {"img_weight": torch.full((140,), 1e-7, device=device)}
    unscaled = value_and_grads(lambda *a: sigmoid_loss(*a, **pairs, backend=backend), inputs)
    assert unscaled[1].count_nonzero() == 0
    # 65536 itself is no float16 number, which is what a loss scaler starts with.
    check_against_reference(inputs, pairs, torch.float16, backend, dloss=65536.0)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_tail_of_the_loss_is_relatively_exact(backend, device):
    # Negatives only, at logits of -20: log(1 + exp(z)) computed as written is 0 or 72% off.
    img, txt, log_scale, _ = make_inputs(20, 20, 16, torch.float32, device)
    far = torch.tensor(-20.0, device=device)
    ids = {"img_ids": torch.zeros(20, device=device).int(), "txt_ids": torch.ones(20).int()}
    ids = {name: x.to(device) for name, x in ids.items()}
    gold = reference.sigmoid_loss(*(x.double() for x in (img, txt, log_scale, far)), **ids)
    loss = sigmoid_loss(img, txt, log_scale, far, **ids, backend=backend)
    # exp rounds a multiple of its argument, about 30 half-EPS steps; 64 leaves room for the sum.
    assert abs(loss.item() / gold.item() - 1) < 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("B", "M"), [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_empty_batch_is_zero_with_zero_gradients(backend, device, B, M):
    inputs = make_inputs(B, M, 16, torch.float32, device)
    ids = [torch.arange(n, device=device) for n in (B, M)]
    fn = lambda *a: sigmoid_loss(*a, img_ids=ids[0], txt_ids=ids[1], backend=backend)
    for result in value_and_grads(fn, inputs):
        assert (result == 0).all()
    rows, columns = pairwise_sigmoid_loss_sums(*inputs, img_ids=ids[0], txt_ids=ids[1])
    assert rows.tolist() == [0.0] * B
    assert columns.tolist() == [0.0] * M


@pytest.mark.parametrize("shape", PAIR_SHAPES.values(), ids=PAIR_SHAPES.keys())
@pytest.mark.parametrize("kind", ["ids", "weighted"])
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_pairwise_sums_match_reference(backend, device, dtype, kind, shape, monkeypatch):
    set_chunk_elements(monkeypatch, 5000)
    inputs = make_inputs(*shape, dtype, device)
    pairs = make_pairs(kind, *shape[:2], device)
    gold = reference.pairwise_sigmoid_loss_sums(*(x.double() for x in inputs), **pairs)
    eager = reference.pairwise_sigmoid_loss_sums(*inputs, **pairs)
    actual = pairwise_sigmoid_loss_sums(*inputs, **pairs, backend=backend)
    for name, a, e, g in zip(("rows", "columns"), actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, dtype)
        assert not a.requires_grad


def test_reference_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in make_inputs(3, 4, 5, torch.float32)]
    pairs = make_pairs("weighted", 3, 4)
    assert torch.autograd.gradcheck(lambda *a: reference.sigmoid_loss(*a, **pairs), inputs)


def test_reference_is_the_double_loop_of_the_paper():
    img, txt, log_scale, bias = (x.double() for x in make_inputs(4, 4, 3, torch.float32))
    total = 0.0
    for i in range(4):
        for j in range(4):
            z = log_scale.exp() * (img[i] @ txt[j]) + bias
            total -= torch.sigmoid(z if i == j else -z).log()
    loss = reference.sigmoid_loss(img, txt, log_scale, bias)
    torch.testing.assert_close(loss, total / 4, rtol=1e-14, atol=0)


def test_chunked_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in make_inputs(5, 4, 3, torch.float32)]
    pairs = make_pairs("weighted", 5, 4)
    assert torch.autograd.gradcheck(lambda *a: sigmoid_loss(*a, **pairs, backend="chunked"), inputs)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_opcheck(backend, device, needs):
    inputs = [x.detach() for x in make_inputs(4, 6, 16, torch.float32, device)]
    pairs = make_pairs("weighted", 4, 6, device)
    utils = ("test_schema", "test_faketensor")
    args = (*inputs, *pairs.values())
    torch.library.opcheck(
        torch.ops.siglip2.sigmoid_loss.default, (*args, *needs, backend), test_utils=utils
    )
    torch.library.opcheck(
        torch.ops.siglip2.sigmoid_loss_sums.default, (*args, backend), test_utils=utils
    )


@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_compiles_without_graph_breaks(backend, device):
    inputs = make_inputs(6, 4, 16, torch.float32, device)
    pairs = make_pairs("weighted", 6, 4, device)
    fn = lambda *a: sigmoid_loss(*a, **pairs, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = (value_and_grads(f, inputs, dloss=3.0) for f in (compiled, fn))
    for name, c, e in zip(NAMES, *results, strict=True):
        assert torch.equal(c, e), name


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_frozen_towers_change_no_other_gradient(backend, device, frozen):
    inputs = make_inputs(20, 20, 16, torch.float32, device)
    whole = value_and_grads(lambda *a: sigmoid_loss(*a, backend=backend), inputs)
    part = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    learned = [x for x in part if x.requires_grad]
    grads = iter(torch.autograd.grad(sigmoid_loss(*part, backend=backend), learned))
    for i, x in enumerate(part):
        assert not x.requires_grad or torch.equal(next(grads), whole[1 + i])


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_result_does_not_depend_on_autocast(backend, device):
    inputs = make_inputs(20, 20, 16, torch.float32, device)
    fn = lambda *a: sigmoid_loss(*a, backend=backend)
    plain = value_and_grads(fn, inputs)
    with torch.autocast(device, torch.bfloat16):
        assert all(
            torch.equal(x, y) for x, y in zip(plain, value_and_grads(fn, inputs), strict=True)
        )


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_two_runs_are_bit_equal(backend, device):
    inputs = make_inputs(131, 131, 40, torch.float32, device)
    first, second = (
        value_and_grads(lambda *a: sigmoid_loss(*a, backend=backend), inputs) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_retained_graph_gives_the_same_gradients_twice(backend, device):
    inputs = make_inputs(9, 9, 16, torch.float32, device)
    loss = sigmoid_loss(*inputs, backend=backend)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(
        torch.equal(x, y) for x, y in zip(first, torch.autograd.grad(loss, inputs), strict=True)
    )


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_permuting_captions_with_their_ids_permutes_their_gradients(backend, device):
    img, txt, *scalars = make_inputs(30, 30, 16, torch.float32, device)
    ids = torch.arange(30, device=device)
    order = torch.randperm(30).to(device)
    fn = lambda ids: lambda *a: sigmoid_loss(*a, img_ids=img_ids, txt_ids=ids, backend=backend)
    img_ids = ids
    plain = value_and_grads(lambda *a: sigmoid_loss(*a, backend=backend), (img, txt, *scalars))
    moved = value_and_grads(fn(ids[order]), (img, txt[order], *scalars))
    plain[2] = plain[2][order]
    for name, p, m in zip(NAMES, plain, moved, strict=True):
        terms = cancelling_terms((img, txt, *scalars), {}, "mean").get(name, 0.0)
        assert_no_worse(name, m, p, p.double(), torch.float32, terms=terms)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_chunk_size_changes_no_result(backend, device, monkeypatch):
    # More row tiles than one group of programs holds, and no multiple of it.
    inputs = make_inputs(600, 600, 24, torch.float32, device)
    fn = lambda *a: sigmoid_loss(*a, backend=backend)
    results = []
    for elements in (1 << 20, 40_000, 1):
        set_chunk_elements(monkeypatch, elements)
        results.append(value_and_grads(fn, inputs))
    terms = cancelling_terms(inputs, {}, "mean")
    for other in results[1:]:
        for name, whole, x in zip(NAMES, results[0], other, strict=True):
            size = terms.get(name, 0.0)
            assert_no_worse(name, x, whole, whole.double(), torch.float32, terms=size)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_strided_ids_and_weights_are_read_right(backend, device):
    inputs = make_inputs(20, 20, 16, torch.float32, device)
    pairs = make_pairs("weighted", 20, 20, device)
    strided = {name: torch.stack((x, x + 1), dim=1)[:, 0] for name, x in pairs.items()}
    a, b = (sigmoid_loss(*inputs, **p, backend=backend) for p in (pairs, strided))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_rows_may_be_strided(backend, device):
    inputs = make_inputs(20, 20, 16, torch.float32, device)
    wide = [torch.cat((x, x), dim=1)[:, :16].detach() for x in inputs[:2]]
    a = sigmoid_loss(*inputs, backend=backend)
    assert torch.equal(a, sigmoid_loss(*wide, *inputs[2:], backend=backend))


def test_all_weights_zero_is_zero_without_nan():
    inputs = make_inputs(6, 6, 8, torch.float32)
    fn = lambda *a: sigmoid_loss(*a, img_weight=torch.zeros(6))
    assert all((x == 0).all() for x in value_and_grads(fn, inputs))
