"""What the prototype cross entropy promises whatever the numbers: graphs, dtypes, determinism."""

from functools import partial

import pytest
import torch
from prototype_inputs import TEMPS, make_bias, make_index, make_prototypes, make_token_weight

from compare import assert_no_worse
from siglip2_kernels import prototype_cross_entropy
from siglip2_kernels._core.unit_rows import EPS
from strategies import RUNNERS

ALL_RUNNERS = [p for p in RUNNERS if "cublas" not in p.id]
T, K, D, S = 40, 70, 16, 9
HALF = [torch.float16, pytest.param(torch.bfloat16, id="bfloat16")]


def loss_and_grads(inputs, dloss=1.0, **options):
    loss = prototype_cross_entropy(*inputs, **TEMPS | options)
    learned = [x for x in inputs[:2] if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, learned, torch.full_like(loss, dloss))]


def make(device="cpu", dtype=torch.float32, num=T):
    return make_prototypes(num, K, D, dtype, device, S=S)


def everything(device="cpu", num=T):
    return {
        "teacher_index": make_index(num, S, device),
        "teacher_bias": make_bias(K, device),
        "token_weight": make_token_weight(num, device),
        "valid_count": torch.tensor(num - 3, device=device),
    }


def assert_all_equal(results, expected):
    for r, e in zip(results, expected, strict=True):
        assert torch.equal(r, e)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_opcheck(backend, device, needs):
    student, weight, teacher, teacher_weight = (x.detach() for x in make(device))
    rows = torch.linspace(-1, 1, T, device=device)
    index, bias = make_index(T, S, device), make_bias(K, device)
    scales = torch.tensor(10.0, device=device), torch.tensor(25.0, device=device)
    count = torch.tensor([T], dtype=torch.int32, device=device)
    check = partial(
        torch.library.opcheck,
        torch.ops.siglip2.prototype_cross_entropy.default,
        test_utils=("test_schema", "test_faketensor"),
    )
    inputs = student, weight, teacher, teacher_weight
    check((*inputs, bias, index, rows, count, *scales, 7, *needs, backend))
    check(
        (student, weight, student, weight, None, None, rows, None, *scales, None, *needs, backend)
    )
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    check(torch.ops.siglip2.prototype_lse.default, (student, weight, bias, scales[0], backend))
    norm = torch.ops.siglip2.prototype_weight_norm_bwd.default
    check(norm, (teacher_weight, weight, scales[0], backend))


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_compiles_without_graph_breaks(backend, device, weight_norm):
    inputs = make(device)
    options = everything(device) | {"weight_norm": weight_norm, "backend": backend}
    options |= TEMPS | {"teacher_temp": torch.tensor(0.05, device=device)}
    fn = partial(prototype_cross_entropy, **options)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, fn):
        loss = f(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs[:2], torch.full_like(loss, 3.0))])
    # A traced norm sums in another order.
    for name, a, e in zip(("loss", "dstudent", "dweight"), *results, strict=True):
        assert_no_worse(name, a, e, e.double(), torch.float32)


def test_compiled_for_any_number_of_tokens():
    count = 0

    def backend(graph, example_inputs):
        nonlocal count
        count += 1
        return graph.forward

    fn = partial(prototype_cross_entropy, **TEMPS)
    compiled = torch.compile(fn, fullgraph=True, backend=backend, dynamic=True)
    for num in (40, 41, 57, 300):
        inputs, index = make(num=num), make_index(num, S)
        options = {"teacher_index": index}
        assert torch.equal(compiled(*inputs, **options), fn(*inputs, **options))
    assert count == 1


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_temperatures_on_the_device_equal_numbers(backend, device):
    inputs = make(device)
    options = everything(device) | {"backend": backend}
    temps = {name: torch.tensor(value, device=device) for name, value in TEMPS.items()}
    plain, scheduled = (loss_and_grads(inputs, **options | t) for t in (TEMPS, temps))
    for name, a, e in zip(("loss", "dstudent", "dweight"), scheduled, plain, strict=True):
        assert_no_worse(name, a, e, e.double(), torch.float32, terms=25.0 * e.abs().max())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_float32_weight_is_rounded_and_its_gradient_is_not(backend, device, dtype):
    if dtype is torch.bfloat16 and device == "cpu" and backend == "triton":
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    student, _, teacher, _ = make(device, dtype)
    masters = [make(device)[i].detach() + 1e-5 for i in (1, 3)]  # no 16-bit numbers
    index = make_index(T, S, device)
    run = lambda a, b: loss_and_grads(
        [student, a.requires_grad_(), teacher, b], teacher_index=index, backend=backend
    )
    ours, rounded = run(*masters), run(*(x.detach().to(dtype) for x in masters))
    assert ours[2].dtype is torch.float32
    assert_all_equal(ours[:2], rounded[:2])
    if backend != "reference":  # autograd rounds it between two casts
        assert torch.equal(ours[2].to(dtype), rounded[2])
        assert not torch.equal(ours[2], rounded[2].float())


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_weight_norm_equals_normalised_weights(backend, device):
    student, weight, teacher, teacher_weight = make(device)
    long = [(7 * x).detach().requires_grad_() for x in (weight, teacher_weight)]
    options = everything(device) | {"backend": backend}
    ours = loss_and_grads([student, long[0], teacher, long[1]], weight_norm=True, **options)
    unit = [x / (x.norm(dim=1, keepdim=True) + EPS) for x in long]
    loss = prototype_cross_entropy(student, unit[0], teacher, unit[1], **TEMPS, **options)
    expected = [loss.detach(), *torch.autograd.grad(loss, (student, long[0]))]
    for name, a, e in zip(("loss", "dstudent", "dweight"), ours, expected, strict=True):
        assert_no_worse(name, a, e, e.double(), torch.float32, terms=25.0 * e.abs().max())
    # A gradient through a norm is orthogonal to its row.
    along = (ours[2] * long[0]).sum(1).abs()
    assert (along <= 1e3 * torch.finfo(torch.float32).eps * ours[2].norm(dim=1).max()).all()


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_a_frozen_input_changes_no_other_gradient(backend, device, frozen):
    inputs, options = make(device), everything(device) | {"backend": backend}
    whole = loss_and_grads(inputs, **options)
    part = [x.detach().requires_grad_(i < 2 and i != frozen) for i, x in enumerate(inputs)]
    found = loss_and_grads(part, **options)
    assert torch.equal(found[1], whole[2 - frozen])
    bare = prototype_cross_entropy(*(x.detach() for x in inputs), **TEMPS, **options)
    assert not bare.requires_grad
    size = torch.tensor(25.0)
    for loss in (found[0], bare):
        assert_no_worse("loss", loss, whole[0], whole[0].double(), torch.float32, terms=size)


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_result_does_not_depend_on_autocast(backend, device):
    inputs, options = make(device), everything(device) | {"backend": backend}
    plain = loss_and_grads(inputs, **options)
    with torch.autocast(device, torch.bfloat16):
        assert_all_equal(loss_and_grads(inputs, **options), plain)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_retained_graph_and_second_run_are_bit_equal(backend, device, weight_norm):
    inputs = make(device, num=131)
    options = everything(device, 131) | {"weight_norm": weight_norm, "backend": backend}
    losses = [prototype_cross_entropy(*inputs, **TEMPS, **options) for _ in range(2)]
    grads = lambda loss: torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    first = grads(losses[0])
    assert_all_equal(grads(losses[0]), first)
    assert_all_equal(grads(losses[1]), first)


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_rows_may_be_strided(backend, device):
    inputs, options = make(device), everything(device) | {"backend": backend}
    plain = loss_and_grads(inputs, **options)
    wide = [torch.cat((x, x), dim=1)[:, :D].detach() for x in inputs]
    wide = [x.requires_grad_(i < 2) for i, x in enumerate(wide)]
    assert_all_equal(loss_and_grads(wide, **options), plain)


@pytest.mark.parametrize("chunk_tokens", [128, 77, 5])
def test_chunk_size_changes_no_result(chunk_tokens):
    inputs, options = make(num=300), everything(num=300)
    whole = loss_and_grads(inputs, **options)
    part = loss_and_grads(inputs, **options, chunk_tokens=chunk_tokens)
    for name, a, w in zip(("loss", "dstudent", "dweight"), part, whole, strict=True):
        assert_no_worse(name, a, w, w.double(), torch.float32, terms=25.0 * w.abs().max())


def test_parts_of_the_prototypes_fill_whole_waves():
    pytest.importorskip("triton")
    from siglip2_kernels.prototype_cross_entropy._triton import num_splits

    # 68 tiles on 132 multiprocessors: whole they take two thirds of a wave, in 7 parts 3.6 of 4.
    assert num_splits(68, 1024, 132, 7) == 7
    assert num_splits(68, 1024, 132, 1) == 1
    assert num_splits(132, 1024, 132, 8) == 1
    assert num_splits(1, 1024, 132, 1000) == 128  # eight blocks each; 512 times two take as long
    assert num_splits(5, 2, 132, 8) == 2


@pytest.mark.parametrize(("needs", "products"), [((), 2), ((0,), 3), ((1,), 3), ((0, 1), 4)])
def test_counted_flops_are_those_of_keeping_the_logits(needs, products):
    from siglip2.train.flops import FLOPS

    inputs = [x.detach() for x in make_prototypes(T, K, D, torch.float32)]
    needs = [i in needs for i in (0, 1)]
    formula = FLOPS[torch.ops.siglip2.prototype_cross_entropy]
    assert formula(*inputs, None, None, *needs, "chunked", out_val=None) == 2 * products * T * K * D
    lse = FLOPS[torch.ops.siglip2.prototype_lse]
    assert lse(inputs[0], inputs[1], None, None, "chunked", out_val=None) == 2 * T * K * D
