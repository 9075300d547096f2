"""What the linear cross entropy promises whatever the numbers: graphs, dtypes, buffers, chunks."""

from functools import partial

import pytest
import torch
from head_inputs import OPTIONS, make_head, make_target, make_token_weight

from compare import assert_no_worse
from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy import reference, tokens
from strategies import RUNNERS

HALF = [torch.float16, pytest.param(torch.bfloat16, id="bfloat16")]


def loss_and_grads(x, weight, bias, target, dloss=1.0, **options):
    loss = linear_cross_entropy(x, weight, target, bias=bias, **options)
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, dloss))]


def make(device="cpu", T=40, V=70, D=16, dtype=torch.float32):
    return (*make_head(T, V, D, dtype, device), make_target(T, V, device))


def assert_all_equal(results, expected):
    for r, e in zip(results, expected, strict=True):
        assert torch.equal(r, e)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False,) * 3])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_opcheck(backend, device, needs):
    x, weight, bias, target = make(device, T=5)
    rows = make_token_weight(5, device) / 7
    args = (x.detach(), weight.detach(), target.clamp(min=0), bias.detach(), rows)
    for options in ((0.0, 0.0, None, None), (0.1, 0.1, None, 2), (0.0, 0.1, 3.0, 3)):
        torch.library.opcheck(
            torch.ops.siglip2.linear_cross_entropy.default,
            (*args, *options, *needs, True, backend),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_compiles_without_graph_breaks(backend, device, reduction):
    torch.compiler.reset()  # versions of other cases count towards the limit of recompiles
    x, weight, bias, target = make(device)
    index = torch.arange(0, 40, 2, device=device)
    options = {"token_weight": make_token_weight(40, device), "backend": backend}
    options |= {"reduction": reduction, "valid_index": index, "return_lse": True}
    options |= {"return_accuracy": True, "z_loss": 0.01}
    fn = partial(linear_cross_entropy, target=target, **options)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    inputs = {"x": x, "weight": weight, "bias": bias}
    results = []
    for f in (compiled, fn):
        out = f(**inputs)
        grads = torch.autograd.grad(out.loss, inputs.values(), torch.full_like(out.loss, 3.0))
        results.append([*out, *grads])
    assert_all_equal(*results)


def test_compiled_for_any_number_of_tokens():
    torch.compiler.reset()  # versions of other cases count towards the limit of recompiles
    count = 0

    def backend(graph, example_inputs):
        nonlocal count
        count += 1
        return graph.forward

    fn = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend, dynamic=True)
    for T in (40, 41, 57, 300):
        x, weight, bias, target = make(T=T)
        assert torch.equal(
            fn(x, weight, target, bias=bias), linear_cross_entropy(x, weight, target, bias=bias)
        )
    assert count == 1


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_compiled_backward_fills_the_buffer(backend, device):
    torch.compiler.reset()  # versions of other cases count towards the limit of recompiles
    x, weight, _, target = make(device)
    fn = partial(linear_cross_entropy, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    buffers = [torch.ones(70, 16, device=device) for _ in range(2)]
    for f, buffer in zip((fn, compiled), buffers, strict=True):
        torch.autograd.grad(f(x, weight, target, weight_grad_out=buffer), x)
    assert_all_equal(buffers[1:], buffers[:1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_buffer_takes_the_weights_gradient_of_every_backward(backend, device, is_frozen, reduction):
    x, weight, bias, target = make(device)
    options = {"reduction": reduction, "backend": backend}
    plain = loss_and_grads(x, weight, bias, target, dloss=3.0, **options)
    buffer = torch.ones(70, 16, device=device)
    weight = weight.detach().requires_grad_(not is_frozen)
    losses = [
        linear_cross_entropy(x, weight, target, bias=bias, weight_grad_out=buffer, **options)
        for _ in range(2)
    ]
    inputs = [x, weight, bias] if weight.requires_grad else [x, bias]
    for loss in losses:
        grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, 3.0), allow_unused=True)
        assert torch.equal(grads[0], plain[1])
        assert torch.equal(grads[-1], plain[3])
        assert is_frozen or grads[1] is None
    gold = 1 + 2 * plain[2].double()
    assert_no_worse("buffer", buffer, (1 + plain[2]) + plain[2], gold, torch.float32)


def test_buffer_stays_untouched_without_gradients():
    x, weight, bias, target = (t.detach() for t in make())
    buffer = torch.ones(70, 16)
    loss = linear_cross_entropy(x, weight, target, bias=bias, weight_grad_out=buffer)
    assert not loss.requires_grad
    assert (buffer == 1).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_float32_weight_is_rounded_and_its_gradient_is_not(backend, device, dtype):
    if dtype is torch.bfloat16 and device == "cpu" and backend in ("triton", "cublas"):
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    x, _, bias, target = make(device, dtype=dtype)
    master = make(device)[1]
    master.data += 1e-5  # no 16-bit number
    ours = loss_and_grads(x, master, bias, target, backend=backend)
    rounded = loss_and_grads(
        x, master.detach().to(dtype).requires_grad_(), bias, target, backend=backend
    )
    assert ours[2].dtype is torch.float32
    assert torch.equal(ours[0], rounded[0])
    assert torch.equal(ours[1], rounded[1])
    if backend != "reference":  # autograd rounds it between two casts
        assert torch.equal(ours[2].to(dtype), rounded[2])
        assert not torch.equal(ours[2], rounded[2].float())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_frozen_inputs_change_no_other_gradient(backend, device, frozen):
    *inputs, target = make(device)
    whole = loss_and_grads(*inputs, target, backend=backend)
    part = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    expected = [g for i, g in enumerate(whole[1:]) if i not in frozen]
    assert_all_equal(loss_and_grads(*part, target, backend=backend)[1:], expected)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_result_does_not_depend_on_autocast(backend, device):
    inputs = make(device)
    plain = loss_and_grads(*inputs, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert_all_equal(loss_and_grads(*inputs, backend=backend), plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_retained_graph_and_second_run_are_bit_equal(backend, device, reduction):
    x, weight, bias, target = make(device, T=131)
    options = {"reduction": reduction, "backend": backend}
    losses = [linear_cross_entropy(x, weight, target, bias=bias, **options) for _ in range(2)]
    grads = lambda loss: torch.autograd.grad(
        loss, (x, weight, bias), torch.ones_like(loss), retain_graph=True
    )
    first = grads(losses[0])
    assert_all_equal(grads(losses[0]), first)
    assert_all_equal(grads(losses[1]), first)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_chunk_size_changes_no_result(backend, device, options):
    if backend == "triton" and len(options) == 3:
        pytest.skip("the Triton design does not smooth capped logits")
    inputs = make(device, T=300, V=200)
    whole = loss_and_grads(*inputs, backend=backend, **options)
    for chunk_tokens in (128, 77, 5) if device == "cuda" else (128, 77):
        part = loss_and_grads(*inputs, backend=backend, chunk_tokens=chunk_tokens, **options)
        for name, a, w in zip(("loss", "dx", "dweight", "dbias"), part, whole, strict=True):
            assert_no_worse(name, a, w, w.double(), torch.float32)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_rows_may_be_strided_and_targets_int32(backend, device):
    x, weight, bias, target = make(device)
    plain = loss_and_grads(x, weight, bias, target, backend=backend)
    wide = [torch.cat((t, t), dim=1)[:, :16].detach().requires_grad_() for t in (x, weight)]
    few = torch.stack((target, target), dim=1).int()[:, 0]
    assert_all_equal(loss_and_grads(*wide, bias, few, backend=backend), plain)


@pytest.mark.parametrize("ignore_index", [0, 3, 1000])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_any_target_may_be_the_ignored_one(backend, ignore_index):
    x, weight, bias, target = make()
    plain = loss_and_grads(x, weight, bias, target.masked_fill(target == ignore_index, -100))
    other = torch.where(target == -100, ignore_index, target)
    options = {"ignore_index": ignore_index, "backend": backend}
    for a, e in zip(loss_and_grads(x, weight, bias, other, **options), plain, strict=True):
        torch.testing.assert_close(a, e)


def test_chunks_are_even_whole_tiles_and_never_short():
    # 32 rows of 256,000 logits is what usual rules pick, for 256 passes over the weight's gradient.
    few = {"max_elements": 1 << 20, "min_tokens": 1024}
    assert list(tokens.token_chunks(3000, 256_000, None, **few)) == [
        (0, 1024),
        (1024, 2048),
        (2048, 3000),
    ]
    sizes = [
        b - a
        for a, b in tokens.token_chunks(32_768, 256_000, None, max_elements=1 << 31, min_tokens=1)
    ]
    assert sizes == [8192] * 4
    sizes = [
        b - a for a, b in tokens.token_chunks(9000, 256_000, 8192, max_elements=1, min_tokens=1)
    ]
    assert sizes == [4608, 4392]
    assert list(tokens.token_chunks(0, 5, None, **few)) == []
    assert list(tokens.token_chunks(5, 5, 2, **few)) == [(0, 2), (2, 4), (4, 5)]


def bfloat16_logits(x, weight, target):
    z = (x @ weight.T).float()
    return torch.nn.functional.cross_entropy(z, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16_gradients_err_three_times_less_than_with_bfloat16_logits(reduction):
    x, weight, _ = make_head(256, 4096, 256, torch.bfloat16, std=8.0)
    target = torch.randint(0, 4096, (256,), generator=torch.Generator().manual_seed(1))
    grads = lambda fn, *inputs: torch.autograd.grad(fn(*inputs, target), inputs)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    gold = grads(reference.linear_cross_entropy, *doubles)
    fn = lambda *a: linear_cross_entropy(*a, reduction=reduction).mean()
    eager = grads(bfloat16_logits, x, weight)
    for o, e, g in zip(grads(fn, x, weight), eager, gold, strict=True):
        assert 3 * (o.double() - g).norm() < (e.double() - g).norm()


@pytest.mark.interpreter
def test_bfloat16_exponentials_err_three_times_less_than_bfloat16_logits(monkeypatch):
    from siglip2_kernels.linear_cross_entropy import _triton

    # The interpreter multiplies bfloat16 wrongly and truncates what it stores: the same numbers go
    # in as float32, and exponentials are rounded when they come out, as a GPU stores them.
    launch, allocate, softmax = (
        getattr(_triton._Tiles, name) for name in ("launch", "allocate", "softmax")
    )

    def launch_in_float32(self, x, **tensors):
        weight, self.weight = self.weight, self.weight.float()
        launch(self, x.float(), **tensors)
        self.weight = weight

    def rounded_softmax(self, *args):
        e, scale = softmax(self, *args)
        return e.bfloat16(), scale

    monkeypatch.setattr(_triton._Tiles, "launch", launch_in_float32)
    monkeypatch.setattr(_triton._Tiles, "allocate", lambda s, x, *a: allocate(s, x.float(), *a))
    monkeypatch.setattr(_triton._Tiles, "softmax", rounded_softmax)
    x, weight, _ = (t.detach() for t in make_head(256, 4096, 256, torch.bfloat16, std=8.0))
    target = torch.randint(0, 4096, (256,), generator=torch.Generator().manual_seed(1))
    rows = torch.ones(256)
    *_, dx, dweight, _ = _triton.fwd(
        x, weight, target, None, rows, 0.0, 0.0, None, None, True, True, False, False
    )
    ours = [(d / 256).bfloat16() for d in (dx, dweight)]
    grads = lambda fn, *inputs: torch.autograd.grad(fn(*inputs, target), inputs)
    learned = [t.double().requires_grad_() for t in (x, weight)]
    gold = grads(reference.linear_cross_entropy, *learned)
    eager = grads(bfloat16_logits, *(t.clone().requires_grad_() for t in (x, weight)))
    for o, e, g in zip(ours, eager, gold, strict=True):
        assert o.dtype == e.dtype == torch.bfloat16
        error, eager_error = ((t.double() - g).norm() / g.norm() for t in (o, e))
        print(f"{error:.2e} {eager_error:.2e}")
        assert 3 * error < eager_error
