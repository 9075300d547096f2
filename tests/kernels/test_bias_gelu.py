import pytest
import torch
import torch.nn.functional as F

from compare import assert_no_worse
from siglip2_kernels import bias_gelu
from siglip2_kernels.bias_gelu import reference
from strategies import RUNNERS

OWN = [runner for runner in RUNNERS if runner.values[0] in ("chunked", "triton")]
# One token, a ragged last tile of rows and of columns, So400m's width.
SHAPES = [(1, 8), (37, 300), (300, 256), (19, 4304), (0, 16)]


def make_inputs(T, M, dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    h = (2 * torch.randn(T, M, generator=g)).to(dtype)
    bias = torch.randn(M, generator=g)
    return [x.to(device).requires_grad_() for x in (h, bias)]


def evaluate(fn, inputs, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y = fn(*inputs)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).half().to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def runners_and_dtypes():
    found = []
    for runner in OWN:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if runner.values == ("triton", "cpu") and dtype is torch.bfloat16:
                continue  # the interpreter's bf16 is left alone, as in the other tests
            name = f"{runner.id}-{str(dtype)[6:]}"
            found.append(pytest.param(*runner.values, dtype, id=name, marks=runner.marks))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_matches_reference(backend, device, dtype, shape):
    inputs = make_inputs(*shape, dtype, device)
    gold = evaluate(reference.bias_gelu, inputs, torch.float64)
    eager = evaluate(reference.bias_gelu, inputs)
    actual = evaluate(lambda h, b: bias_gelu(h, b, backend=backend), inputs)
    terms = float(gold[1].abs().sum(0).max()) if shape[0] else 0.0
    for name, a, e, g in zip(("y", "dh", "db"), actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, dtype, terms=terms if name == "db" else 0.0)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_ends_of_the_range_are_the_identity_and_zero(backend, device):
    h = torch.tensor([[-1e4, -60.0, -0.0, 60.0, 1e4]] * 3, device=device, requires_grad=True)
    y = bias_gelu(h, torch.zeros(5, device=device), backend=backend)
    (dh,) = torch.autograd.grad(y.sum(), h)
    assert torch.equal(y[0].cpu(), torch.tensor([0.0, 0.0, 0.0, 60.0, 1e4]))
    assert torch.equal(dh[0].cpu(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_is_the_activation_of_a_linear_layer():
    """As in the towers: the product without bias, then this."""
    x, weight = torch.randn(9, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    for h in (x @ weight.T, (x @ weight.T).view(3, 3, 7)):
        actual = bias_gelu(h, bias)
        assert actual.shape == h.shape
        torch.testing.assert_close(actual.view(9, 7), expected, rtol=1e-13, atol=1e-13)


def test_gradcheck_and_opcheck():
    inputs = [x.detach().double().requires_grad_() for x in make_inputs(5, 7, torch.float32)]
    assert torch.autograd.gradcheck(bias_gelu, inputs)
    torch.library.opcheck(torch.ops.siglip2.bias_gelu.default, (*inputs, "chunked"))
    compiled = torch.compile(bias_gelu, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), bias_gelu(*inputs))


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_two_runs_are_bit_equal(backend, device):
    inputs = make_inputs(700, 40, torch.float32, device)
    run = lambda: evaluate(lambda h, b: bias_gelu(h, b, backend=backend), inputs)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_keeps_the_product_and_nothing_else():
    h, bias = make_inputs(64, 32, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        bias_gelu(h, bias)
    assert sum(x.nbytes for x in saved) == h.nbytes + bias.nbytes


def test_rejects_wrong_input():
    h = torch.zeros(3, 4)
    with pytest.raises(
        ValueError, match=r"need h \(\.\.\., M\) and bias \(M,\); got \(3, 4\), \(3,\)"
    ):
        bias_gelu(h, torch.zeros(3))
    with pytest.raises(ValueError, match=r"need floats; got torch\.int64 and torch\.float32"):
        bias_gelu(h.long(), torch.zeros(4))
    with pytest.raises(ValueError, match="on one device; got cpu and meta"):
        bias_gelu(h, torch.zeros(4, device="meta"))
