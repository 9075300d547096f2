import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels import map_pool
from siglip2_kernels._core.varlen import cu_seqlens_from_lengths
from siglip2_kernels.map_pool import reference
from strategies import LENGTHS, RUNNERS

# "chunked" reads the lengths on the host, which on a GPU would wait for it.
OWN = [
    runner
    for runner in RUNNERS
    if runner.values in (("chunked", "cpu"), ("triton", "cpu"), ("triton", "cuda"))
]
# (D, H): head widths 64, 72 and 96, and one that divides no tile
WIDTHS = {"64": (128, 2), "72": (216, 3), "96": (192, 2), "odd": (40, 5)}
NAMES = ("pooled", "dx", "dprobe", "dq_weight", "dq_bias", "dkv_weight", "dkv_bias")


def make_inputs(lengths, D, dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape, scale=1.0: (torch.randn(*shape, generator=g) * scale).to(device)
    x = draw(sum(lengths), D).to(dtype)
    weights = [draw(1, D), draw(D, D, scale=D**-0.5), draw(D, scale=0.3)]
    weights += [draw(2 * D, D, scale=D**-0.5), draw(2 * D, scale=0.3)]
    inputs = [t.requires_grad_() for t in (x, *weights)]
    return inputs, cu_seqlens_from_lengths(lengths, device)


def evaluate(fn, inputs, dtype=None):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = fn(*inputs)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g).half().to(out.device, out.dtype)
    grads = torch.autograd.grad(out, inputs, dout, materialize_grads=True)
    return [out.detach(), *grads]


def bound(cu, longest, H, **kwargs):
    return lambda x, *w: map_pool(x, cu, longest, *w, num_heads=H, **kwargs)


def own_and_dtypes():
    found = []
    for runner in OWN:
        backend, device = runner.values
        dtypes = [torch.float32, torch.float16]
        if not (backend == "triton" and device == "cpu"):  # the interpreter has no bf16 products
            dtypes.append(torch.bfloat16)
        for dtype in dtypes:
            name = f"{runner.id}-{str(dtype)[6:]}"
            found.append(pytest.param(backend, device, dtype, id=name, marks=runner.marks))
    return found


def check(backend, device, dtype, lengths, D, H):
    inputs, cu = make_inputs(lengths, D, dtype, device)
    spec = lambda x, *w: reference.map_pool(x, cu, *w, num_heads=H)
    gold = evaluate(spec, inputs, torch.float64)
    eager = evaluate(spec, inputs)
    actual = evaluate(bound(cu, max(lengths, default=0), H, backend=backend), inputs)
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
        if name == "dkv_bias":  # the keys' half is 0 in exact arithmetic
            assert (a[:D] == 0).all()
            a, e, g = a[D:], e[D:], g[D:]
        # What goes through the softmax is a difference: dx has the size of its terms.
        terms = float(gold[1].abs().sum()) if name in NAMES[2:6] else 0.0
        assert_no_worse(name, a, e, g, dtype, terms=terms)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), own_and_dtypes())
def test_matches_reference(backend, device, dtype, lengths):
    check(backend, device, dtype, lengths, *WIDTHS["64"])


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), own_and_dtypes())
def test_every_head_width_matches_reference(backend, device, dtype, width):
    check(backend, device, dtype, [70, 3, 64], *width)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_a_neighbour_s_infinities_do_not_leak(backend, device):
    inputs, cu = make_inputs([5, 7, 3], 32, torch.float32, device)
    alone, _ = make_inputs([5, 7, 3], 32, torch.float32, device)
    with torch.no_grad():
        inputs[0][5:12] = torch.inf
    outs = [bound(cu, 7, 2, backend=backend)(*x) for x in (inputs, alone)]
    assert torch.equal(outs[0][[0, 2]], outs[1][[0, 2]])


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_two_runs_are_bit_equal(backend, device):
    inputs, cu = make_inputs([70, 3, 65], 48, torch.float32, device)
    fn = bound(cu, 70, 2, backend=backend)
    assert all(
        torch.equal(a, b) for a, b in zip(evaluate(fn, inputs), evaluate(fn, inputs), strict=True)
    )


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_tokens_past_the_last_sequence_are_left_out(backend, device):
    (x, *weights), cu = make_inputs([4, 3], 32, torch.float32, device)
    longer = torch.cat((x.detach(), torch.full((5, 32), 7.0, device=device))).requires_grad_()
    fn = bound(cu, 4, 2, backend=backend)
    whole, part = evaluate(fn, [longer, *weights]), evaluate(fn, [x, *weights])
    torch.testing.assert_close(whole[0], part[0])
    assert (whole[1][7:] == 0).all()


def test_large_scores_do_not_overflow():
    (x, *weights), cu = make_inputs([9, 4], 32, torch.float32)
    with torch.no_grad():
        weights[0] *= 1e4
    out = bound(cu, 9, 2)(x, *weights)
    gold = reference.map_pool(x.double(), cu, *(w.double() for w in weights), num_heads=2)
    torch.testing.assert_close(out.double(), gold, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    inputs, cu = make_inputs([3, 0, 2], 4, torch.float64)
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(bound(cu, 3, 2), inputs)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_opcheck_and_fullgraph(backend, device):
    inputs, cu = make_inputs([3, 5], 32, torch.float32, device)
    u = torch.randn(2, 32, device=device, requires_grad=True)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (inputs[0], u, cu, 5, backend)
    torch.library.opcheck(torch.ops.siglip2.map_pool.default, args, test_utils=utils)
    fn = bound(cu, 5, 2, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(evaluate(compiled, inputs), evaluate(fn, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_saves_no_keys_and_values():
    inputs, cu = make_inputs([600, 400], 64, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        bound(cu, 600, 2)(*inputs)
    assert sizes.count(1000 * 64) == 1  # x itself; keys and values would be two more
    assert max(sizes) == 1000 * 64


def test_rejects_bad_input_by_name():
    (x, *weights), cu = make_inputs([3, 2], 8, torch.float32)
    with pytest.raises(ValueError, match=r"need x \(T, D\) of floats; got \(5, 2, 4\)"):
        map_pool(x.view(5, 2, 4), cu, 3, *weights, num_heads=2)
    with pytest.raises(
        ValueError, match=r"need cu_seqlens \(B\+1,\) int32; got \(3,\) torch.int64"
    ):
        map_pool(x, cu.long(), 3, *weights, num_heads=2)
    with pytest.raises(ValueError, match="need num_heads to divide D=8; got 3"):
        map_pool(x, cu, 3, *weights, num_heads=3)
    with pytest.raises(ValueError, match=r"need kv_bias \(16,\) of floats; got \(8,\)"):
        map_pool(x, cu, 3, *weights[:-1], weights[-1][:8], num_heads=2)
    with pytest.raises(NotImplementedError, match="backend 'cuda'"):
        map_pool(x, cu, 3, *weights, num_heads=2, backend="cuda")
    (x, *weights), cu = make_inputs([3, 2], 8, torch.float32, "meta")
    with pytest.raises(NotImplementedError, match="'chunked': reads cu_seqlens on the host, got m"):
        map_pool(x, cu, 3, *weights, num_heads=2, backend="chunked")
