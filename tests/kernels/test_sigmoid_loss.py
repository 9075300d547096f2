from functools import partial

import pytest
import torch

from compare import FACTOR, assert_no_worse
from siglip2_kernels import pairwise_sigmoid_loss_sums, sigmoid_loss, sigmoid_loss_and_grads
from siglip2_kernels._core.backend import INTERPRET
from siglip2_kernels.sigmoid_loss import _chunked, reference
from siglip2_kernels.sigmoid_loss.inputs import Pairs
from strategies import (
    PAIR_SHAPES,
    RUNNERS,
    TEMPERATURES,
    make_features,
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
    if backend == "cublas" and dtype is not torch.float32:  # its logits are float16
        eager = worst(eager, evaluate(with_float16_products), gold)
    actual = evaluate(sigmoid_loss, backend=backend)
    terms = cancelling_terms(inputs, pairs, reduction)
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, dtype, terms=dloss * terms.get(name, 0.0))


def with_float16_products(img, txt, log_scale, bias, **kwargs):
    """The reference with dot products rounded once to float16, and their gradients unrounded."""
    raw = img.float() @ txt.float().T
    raw = raw + (raw.half().float() - raw).detach()
    zero, identity = torch.zeros_like(bias), torch.eye(len(txt), device=img.device)
    scaled = log_scale.exp() * raw + bias
    return reference.sigmoid_loss(scaled, identity, zero, zero, **kwargs)


def worst(eager, other, gold):
    """Of each result, the one that errs more."""
    errors = ([(x - g).abs().max() for x, g in zip(xs, gold, strict=True)] for xs in (eager, other))
    pairs = zip(eager, other, *errors, strict=True)
    return [e if error >= other_error else o.to(e.dtype) for e, o, error, other_error in pairs]


def set_chunk_elements(monkeypatch, elements):
    """Triton's chunks are whole tiles: 128 rows at least."""
    monkeypatch.setitem(_chunked.MAX_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(_chunked, "MAX_ELEMENTS_DEVICE", elements)
    if INTERPRET or torch.cuda.is_available():
        from siglip2_kernels.sigmoid_loss import _cublas, _triton

        monkeypatch.setattr(_triton, "MAX_ELEMENTS", elements)
        monkeypatch.setattr(_cublas, "MAX_ELEMENTS", elements)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["diagonal", "ignored", "ids", "weighted"])
@pytest.mark.parametrize("shape", PAIR_SHAPES.values(), ids=PAIR_SHAPES.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_matches_reference(backend, device, dtype, shape, kind, temperature, monkeypatch):
    set_chunk_elements(monkeypatch, 5000)
    B, M, D = shape
    if kind in ("diagonal", "ignored"):
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
    args = (*inputs, *Pairs(**pairs))
    torch.library.opcheck(
        torch.ops.siglip2.sigmoid_loss.default, (*args, *needs, backend), test_utils=utils
    )
    torch.library.opcheck(
        torch.ops.siglip2.sigmoid_loss_sums.default, (*args, backend), test_utils=utils
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_compiles_without_graph_breaks(backend, device, normalize):
    torch.compiler.reset()  # versions of other cases count towards the limit of recompiles
    inputs = make_inputs(6, 4, 16, torch.float32, device)
    options = make_pairs("weighted", 6, 4, device)
    options |= {"normalize": normalize, "backend": backend}
    fn = lambda *a: sigmoid_loss(*a, **options)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = (value_and_grads(f, inputs, dloss=3.0) for f in (compiled, fn))
    for name, c, e in zip(NAMES, *results, strict=True):
        assert torch.equal(c, e), name
    if backend == "reference":  # autograd inside the graph
        return
    fn = lambda *a: sigmoid_loss_and_grads(*a, **options)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for name, c, e in zip(NAMES, compiled(*inputs), fn(*inputs), strict=True):
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


def unit(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


def eager_on_unit_rows(img, txt, *scalars, fn=reference.sigmoid_loss, **options):
    """The reference on rows of the precision `normalize` promises; gradients see no rounding."""
    half = img.dtype.itemsize == 2
    rows = [unit(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (img, txt)]
    if half:
        rows = [u + (u.half().float() - u).detach() for u in rows]
    return fn(*rows, *scalars, **options)


# D = 72 and 1152: widths that are no power of two, the latter So400m's.
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(33, 40, 72), (130, 140, 1152)], ids=str)
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_normalize_matches_reference(backend, device, dtype, shape, temperature):
    inputs = make_features(*shape, dtype, device, temperature)
    pairs = make_pairs("weighted", *shape[:2], device)
    normalized = lambda fn, **kw: lambda *a: fn(*a, **pairs, **kw)
    spec = normalized(reference.sigmoid_loss, normalize=True)
    gold = value_and_grads(spec, inputs, torch.float64)
    eager = value_and_grads(normalized(eager_on_unit_rows), inputs)
    actual = value_and_grads(normalized(sigmoid_loss, normalize=True, backend=backend), inputs)
    rows = [unit(x.double()) for x in inputs[:2]]
    terms = cancelling_terms([*rows, *inputs[2:]], pairs, "mean")
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
        assert not a.isnan().any()
        if name in ("dimg", "dtxt"):
            # The row of zeros has 1e8 times the others' gradient: it would hide their errors.
            if dtype is not torch.float16:  # where that is infinite
                assert_no_worse(name, a[-1], e[-1], g[-1], dtype)
            a, e, g = a[:-1], e[:-1], g[:-1]
        assert_no_worse(name, a, e, g, dtype, terms=terms.get(name, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_normalized_sums_match_reference(backend, device, dtype):
    img, txt, *scalars = make_features(40, 30, 72, dtype, device, "trained")
    pairs = make_pairs("weighted", 40, 30, device)
    rows = [unit(x.float()) for x in (img, txt)]
    doubles = [x.double() for x in (img, txt, *scalars)]
    gold = reference.pairwise_sigmoid_loss_sums(*doubles, **pairs, normalize=True)
    eager = reference.pairwise_sigmoid_loss_sums(
        *(x.to(dtype).float() for x in rows), *scalars, **pairs
    )
    actual = pairwise_sigmoid_loss_sums(
        img, txt, *scalars, **pairs, normalize=True, backend=backend
    )
    for name, a, e, g in zip(("rows", "columns"), actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, dtype)


def test_normalize_gradcheck():
    inputs = make_features(5, 4, 3, torch.float64)
    for x in inputs[:2]:
        x.data[-1] = 1.0  # the norm has a kink at 0
    inputs[2:] = [x.detach().double().requires_grad_() for x in inputs[2:]]
    pairs = make_pairs("weighted", 5, 4)
    fn = lambda *a: sigmoid_loss(*a, **pairs, normalize=True)
    assert torch.autograd.gradcheck(fn, inputs)


def trained_features(N, D):
    """bfloat16 features at temperature 117 whose positives are right, but not by far: z near 7."""
    g = torch.Generator().manual_seed(0)
    img, noise = torch.randn(N, D, generator=g), torch.randn(N, D, generator=g)
    txt = 0.2 * img + (1 - 0.2**2) ** 0.5 * noise
    return [x.bfloat16().requires_grad_() for x in (4 * img, 4 * txt)], TEMPERATURES["trained"]


@pytest.mark.parametrize("D", [768, 1152])
def test_bfloat16_gradients_err_five_times_less_than_with_bfloat16_logits(D):
    features, temperature = trained_features(256, D)
    scalars = [torch.tensor(x) for x in temperature]

    def bfloat16_logits(img, txt, log_scale, bias):
        img, txt = (unit(x.float()).bfloat16() for x in (img, txt))
        z = log_scale.exp().bfloat16() * img @ txt.T + bias.bfloat16()
        y = 2 * torch.eye(len(img), dtype=z.dtype) - 1
        return -torch.nn.functional.logsigmoid(y * z).sum() / len(img)

    inputs = [*features, *(x.requires_grad_() for x in scalars)]
    spec = lambda *a: reference.sigmoid_loss(*a, normalize=True)
    gold = value_and_grads(spec, inputs, torch.float64)[1:3]
    ours = value_and_grads(lambda *a: sigmoid_loss(*a, normalize=True), inputs)[1:3]
    eager = value_and_grads(bfloat16_logits, inputs)[1:3]
    for g, o, e in zip(gold, ours, eager, strict=True):
        assert 5 * (o.double() - g).norm() < (e.double() - g).norm()


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_normalized_bfloat16_runs_where_bfloat16_products_cannot(backend):
    # Unit rows are float16, whatever came.
    inputs = make_features(20, 20, 40, torch.bfloat16)
    losses = [sigmoid_loss(*inputs, normalize=True, backend=b) for b in (backend, "chunked")]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_loss_and_grads_are_those_of_autograd(backend, device, dtype, reduction, normalize):
    make = make_features if normalize else make_inputs
    inputs = make(40, 30, 24, dtype, device)
    options = {"reduction": reduction, "normalize": normalize, "backend": backend}
    options |= make_pairs("weighted", 40, 30, device)
    expected = value_and_grads(lambda *a: sigmoid_loss(*a, **options), inputs)
    results = sigmoid_loss_and_grads(*inputs, **options)
    for name, a, e in zip(NAMES, results, expected, strict=True):
        assert a.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert not a.requires_grad
        # One more product of scalars, then the same rounding.
        eps = torch.finfo(e.dtype).eps
        torch.testing.assert_close(a.to(e.dtype), e, rtol=4 * eps, atol=0, msg=name)


@pytest.mark.parametrize("normalize", [False, True])
def test_reference_loss_and_grads_are_those_of_autograd(normalize):
    inputs = make_inputs(9, 9, 8, torch.float32)
    options = {"normalize": normalize, "backend": "reference"}
    expected = value_and_grads(lambda *a: sigmoid_loss(*a, **options), inputs)
    for a, e in zip(sigmoid_loss_and_grads(*inputs, **options), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_loss_and_grads_leave_out_what_is_not_needed(backend, needs):
    inputs = make_inputs(9, 9, 8, torch.float32)
    everything = sigmoid_loss_and_grads(*inputs, backend=backend)
    some = sigmoid_loss_and_grads(
        *inputs, backend=backend, needs_dimg=needs[0], needs_dtxt=needs[1]
    )
    assert [x is not None for x in some[1:3]] == list(needs)
    for a, e in zip(some, everything, strict=True):
        assert a is None or torch.equal(a, e)


@pytest.mark.parametrize(("B", "M"), [(0, 5), (5, 0)])
def test_loss_and_grads_of_an_empty_batch_are_zero(B, M):
    img, txt, *scalars = make_features(6, 6, 16, torch.bfloat16)
    ids = {"img_ids": torch.arange(B), "txt_ids": torch.arange(M)}
    results = sigmoid_loss_and_grads(img[:B], txt[:M], *scalars, **ids, normalize=True)
    assert [x.shape for x in results] == [(), (B, 16), (M, 16), (), ()]
    assert all((x == 0).all() and x.dtype is torch.float32 for x in results)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("N", [1, 17])
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_odd_batches_have_float32_losses(backend, device, dtype, N, normalize):
    inputs = make_inputs(N, N, 48, dtype, device, "trained")
    loss = sigmoid_loss(*inputs, normalize=normalize, backend=backend)
    assert loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    gold = reference.sigmoid_loss(*(x.double() for x in inputs), normalize=normalize)
    eager = (reference.sigmoid_loss, eager_on_unit_rows)[normalize](*inputs)
    assert_no_worse("loss", loss, eager, gold, dtype)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_uneven_last_chunk_counts_its_own_rows_only(rows, temperature, monkeypatch):
    # Peers' kernels read rows of the chunk before, left in a buffer that is reused.
    inputs = make_inputs(33, 33, 16, torch.float32, temperature=temperature)
    set_chunk_elements(monkeypatch, rows * 33)
    check_against_reference(inputs, make_pairs("ignored", 33, 33), torch.float32, "chunked")
    check_against_reference(inputs, make_pairs("weighted", 33, 33), torch.float32, "chunked")


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_ignored_pairs_touch_nothing(backend, device):
    # All negatives share the group of some positive: what remains is the diagonal alone.
    inputs = make_inputs(30, 30, 16, torch.float32, device)
    one = torch.zeros(30, dtype=torch.int64, device=device)
    ignored = {"img_ignore_ids": one, "txt_ignore_ids": one}
    loss, dimg, *_ = value_and_grads(
        lambda *a: sigmoid_loss(*a, **ignored, backend=backend), inputs
    )
    img, txt, log_scale, bias = (x.detach().double() for x in inputs)
    z = log_scale.exp() * (img * txt).sum(-1) + bias
    gold = torch.nn.functional.softplus(-z).mean()
    torch.testing.assert_close(loss.double(), gold, rtol=1e-6, atol=0)
    gold = -(torch.sigmoid(-z) * log_scale.exp() / 30)[:, None] * txt
    torch.testing.assert_close(dimg.double(), gold, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("backend", "device"), [("chunked", "cpu"), *(r for r in RUNNERS if "gpu" in str(r.marks))]
)
def test_float16_negatives_do_not_underflow_at_65536_images(backend, device, normalize):
    # 1 / B is 2^-16: a G that carries it is 0 for every negative in float16.
    B, M, D = 65_536, 64, 32
    img, txt, *scalars = make_inputs(B, M, D, torch.float16, device)
    ids = {"img_ids": torch.arange(B, device=device), "txt_ids": torch.arange(M, device=device)}
    scaler = 65536.0
    fn = lambda *a, f=sigmoid_loss, **kw: f(*a, **ids, normalize=normalize, **kw)
    inputs = img, txt, *scalars
    gold = value_and_grads(
        lambda *a: fn(*a, f=reference.sigmoid_loss), inputs, torch.float64, scaler
    )
    actual = value_and_grads(lambda *a: fn(*a, backend=backend), inputs, dloss=scaler)
    # Unit rows are float16, and so are the products of "cublas".
    products = with_float16_products if backend == "cublas" else reference.sigmoid_loss
    spec = partial(eager_on_unit_rows, fn=products) if normalize else products
    eager = value_and_grads(lambda *a: spec(*a, **ids), inputs, dloss=scaler)
    a, e, g = actual[1][M:].double(), eager[1][M:], gold[1][M:]  # images without a positive
    normal = g.abs() > torch.finfo(torch.float16).smallest_normal
    assert normal.double().mean() > 0.9
    assert (a[normal] != 0).all()
    # For each image alone, however small its gradient: G's and the result's own roundings, and
    # those that eager has as well.
    errors, eager_errors = ((x - g).norm(dim=-1) / g.norm(dim=-1) for x in (a, e))
    eps = torch.finfo(torch.float16).eps
    assert errors.max() <= 2 * eps + FACTOR * eager_errors.max()
