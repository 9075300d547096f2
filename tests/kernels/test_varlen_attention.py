"""Values and gradients of attention in a pack against the specification."""

import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels import make_plan, padded_attention, varlen_attention, varlen_qkv_attention
from siglip2_kernels._core.varlen import cu_seqlens_from_lengths, paired_bounds
from siglip2_kernels.varlen_attention import reference
from strategies import LENGTHS, RUNNERS

OWN = [
    runner
    for runner in RUNNERS
    if runner.values in (("chunked", "cpu"), ("triton", "cpu"), ("triton", "cuda"))
]
FLASH = pytest.param("varlen_attn", "cuda", id="varlen_attn-cuda", marks=pytest.mark.gpu)
PACKS = LENGTHS | {
    "short": [1, 36, 64],
    "two-tiles": [128, 100],
    "several-tiles": [247, 16, 256],
}
# Queries and keys of a sequence: either may be none.
CROSS = {
    "tile": ([5, 0, 3, 40], [7, 4, 0, 33]),
    "tiles": ([130, 3, 0], [20, 150, 7]),
    "few-queries": ([5, 0, 40], [130, 7, 70]),
    "no-keys": ([3, 2], [0, 0]),
}
WIDTHS = [64, 72, 96, 128, 40, 32, 16]
NAMES = ("out", "lse", "dq", "dk", "dv")


def make_inputs(lengths, lengths_k=None, *, H=2, E=64, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, H, E, generator=g).to(device, dtype).requires_grad_()
    n = sum(lengths)
    m = n if lengths_k is None else sum(lengths_k)
    return [draw(n), draw(m), draw(m)]


def bounds(lengths, lengths_k=None, device="cpu"):
    found = (cu_seqlens_from_lengths(lengths, device), max(lengths, default=0))
    if lengths_k is None:
        return found, {}
    cu_k = cu_seqlens_from_lengths(lengths_k, device)
    return found, {"cu_seqlens_k": cu_k, "max_seqlen_k": max(lengths_k, default=0)}


def evaluate(fn, inputs, dtype=None):
    """(out, lse) and the gradients of out, for the same upstream gradient in each dtype."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out, lse = fn(*inputs)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g).half().to(out.device, out.dtype)
    grads = torch.autograd.grad(out, inputs, dout, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def cancelling_terms(inputs, seqs, causal, scale):
    """Largest sum of |terms| in an element of dq and of dk: dS is a difference of two of them."""
    q, k, v = (t.detach().double().cpu() for t in inputs)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).half().double()
    largest = [0.0, 0.0]
    for a, b, c, d in paired_bounds(*seqs):
        if a == b or c == d:
            continue
        scores = torch.einsum("the,she->hts", q[a:b], k[c:d]) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        p = scores.softmax(-1)
        dp = torch.einsum("the,she->hts", dout[a:b], v[c:d])
        ds = p * (dp.abs() + (p * dp).sum(-1, keepdim=True).abs()) * scale
        dq = torch.einsum("hts,she->the", ds, k[c:d].abs())
        dk = torch.einsum("hts,the->she", ds, q[a:b].abs())
        largest = [max(x, float(y.max())) for x, y in zip(largest, (dq, dk), strict=True)]
    return dict(zip(("dq", "dk"), largest, strict=True))


def own_and_dtypes(*, flash=True):
    found = []
    for runner in [*OWN, *([FLASH] if flash else [])]:
        backend, device = runner.values
        dtypes = [torch.float16] if backend == "varlen_attn" else [torch.float32, torch.float16]
        if not (backend == "triton" and device == "cpu"):  # the interpreter has no bf16 products
            dtypes.append(torch.bfloat16)
        for dtype in dtypes:
            name = f"{runner.id}-{str(dtype)[6:]}"
            found.append(pytest.param(backend, device, dtype, id=name, marks=runner.marks))
    return found


def own_dtypes_and_widths():
    """To the compiler float16 is bfloat16: on a GPU our kernels have it at one width only."""
    found = []
    for runner in own_and_dtypes():
        is_twin = runner.values == ("triton", "cuda", torch.float16)
        for E in [72] if is_twin else WIDTHS:
            name = f"{runner.id}-{E}"
            found.append(pytest.param(*runner.values, E, id=name, marks=runner.marks))
    return found


def check(backend, device, dtype, lengths, lengths_k=None, *, E=64, H=2, plan=False, **options):
    inputs = make_inputs(lengths, lengths_k, H=H, E=E, dtype=dtype, device=device)
    (cu, longest), keys = bounds(lengths, lengths_k, device)
    cu_k = keys.get("cu_seqlens_k", cu)
    spec = {"scale": E**-0.5} | options
    specification = lambda q, k, v: reference.varlen_attention(q, k, v, cu, cu_k, **spec)
    gold = evaluate(specification, inputs, torch.float64)
    eager = evaluate(specification, inputs)
    causal = options.get("causal", False) and "lookahead" not in options
    terms = cancelling_terms(inputs, (cu, cu_k), causal, spec["scale"])
    if plan:
        options["plan"] = make_plan(lengths, lengths_k, device=device)
    ours = lambda *qkv: varlen_attention(
        *qkv, cu, longest, backend=backend, return_lse=True, **keys, **options
    )
    for name, *values in zip(NAMES, evaluate(ours, inputs), eager, gold, strict=True):
        if name == "lse":  # -inf where there are no keys
            assert torch.equal(values[0].isinf(), values[2].isinf())
            values = [x.masked_fill(x.isinf(), 0) for x in values]
        assert_no_worse(name, *values, dtype, terms=terms.get(name, 0.0))


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), own_and_dtypes())
def test_matches_reference(backend, device, dtype, lengths):
    check(backend, device, dtype, lengths, plan=True)


@pytest.mark.parametrize("lengths", [[9, 0, 64, 5], [130, 7]], ids=["tile", "tiles"])
@pytest.mark.parametrize(("backend", "device", "dtype", "E"), own_dtypes_and_widths())
def test_every_head_width_matches_reference(backend, device, dtype, E, lengths):
    check(backend, device, dtype, lengths, E=E, H=1)


@pytest.mark.parametrize("lengths", [[9, 0, 64], [200, 70, 1]], ids=["tile", "tiles"])
@pytest.mark.parametrize(("backend", "device", "dtype"), own_and_dtypes())
def test_causal_matches_reference(backend, device, dtype, lengths):
    check(backend, device, dtype, lengths, causal=True, plan=True)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("pair", CROSS.values(), ids=CROSS.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), own_and_dtypes(flash=False))
def test_keys_of_other_lengths_match_reference(backend, device, dtype, pair, causal):
    check(backend, device, dtype, *pair, causal=causal, plan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", CROSS.values(), ids=CROSS.keys())
def test_flash_takes_keys_of_other_lengths(pair, dtype):
    check("varlen_attn", "cuda", dtype, *pair, plan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "varlen_attn"])
@pytest.mark.parametrize("E", [64, 72, 96])
def test_long_sequences_match_reference(backend, E, dtype):
    check(backend, "cuda", dtype, [576, 784, 1024, 1000, 17], E=E, plan=True)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_a_scale_of_ones_own(backend, device):
    check(backend, device, torch.float32, [20, 33], scale=0.5)


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_large_scores_do_not_overflow(backend, device):
    inputs = make_inputs([20, 150], device=device)
    (cu, longest), _ = bounds([20, 150], device=device)
    options = {"scale": 100.0, "return_lse": True}  # exp of such scores is inf
    ours = lambda *qkv: varlen_attention(*qkv, cu, longest, backend=backend, **options)
    spec = lambda *qkv: varlen_attention(*qkv, cu, longest, backend="reference", **options)
    found, eager = evaluate(ours, inputs), evaluate(spec, inputs)
    gold = evaluate(spec, inputs, torch.float64)
    for name, *values in zip(NAMES[:2], found, eager, gold, strict=False):
        assert_no_worse(name, *values, torch.float32)
    # exp(s - lse) is made again in the backward: its error is that of s, some 10^3 roundings.
    for a, b in zip(found[2:], gold[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


def test_gradcheck():
    q, k, v = (t.double() for t in make_inputs([3, 0, 2], [2, 4, 1], H=2, E=3))
    (cu, longest), keys = bounds([3, 0, 2], [2, 4, 1])
    fn = lambda q, k, v: varlen_attention(q, k, v, cu, longest, **keys)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(fn, inputs)
    causal = lambda qkv: varlen_qkv_attention(qkv, cu, longest, causal=True)
    qkv = torch.stack((q, k.new_ones(q.shape), q + 1), 1).detach().requires_grad_()
    assert torch.autograd.gradcheck(causal, qkv)


@pytest.mark.parametrize(("backend", "device"), [*OWN, FLASH])
@pytest.mark.parametrize("lengths", [[40, 3, 64], [150, 30]], ids=["tile", "tiles"])
def test_one_qkv_tensor_equals_its_slices(backend, device, lengths):
    dtype = torch.float16 if backend == "varlen_attn" else torch.float32
    qkv = torch.stack(make_inputs(lengths, dtype=dtype, device=device), 1).detach()
    qkv.requires_grad_()
    (cu, longest), _ = bounds(lengths, device=device)
    whole = varlen_qkv_attention(qkv, cu, longest, backend=backend)
    apart = varlen_attention(*qkv.unbind(1), cu, longest, backend=backend)
    dout = torch.randn_like(whole)
    assert torch.equal(whole, apart)
    (d_whole,), (d_apart,) = (torch.autograd.grad(o, qkv, dout) for o in (whole, apart))
    assert torch.equal(d_whole, d_apart)
    assert d_whole.is_contiguous()


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("N", [40, 150])
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_padded_equals_packed(backend, device, N, causal):
    lengths = [N, 0, 7, N - 5]
    padded = torch.randn(3, len(lengths), N, 2, 32, device=device).requires_grad_()
    valid = torch.arange(N) < torch.tensor(lengths)[:, None]  # (B, N)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = padded_attention(*padded, sizes, causal=causal, backend=backend)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, padded, dout)

    packed = padded.detach()[:, valid.to(device)].requires_grad_()
    (cu, longest), _ = bounds(lengths, device=device)
    expected = varlen_attention(*packed, cu, longest, causal=causal, backend=backend)
    (expected_grad,) = torch.autograd.grad(expected, packed, dout[valid.to(device)])
    assert torch.equal(out[valid], expected)
    assert torch.equal(grad[:, valid], expected_grad)
    assert (out[~valid] == 0).all()
    assert (grad[:, ~valid] == 0).all()


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_padded_takes_keys_of_other_lengths(backend, device):
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (5, 9, 9))
    sizes, sizes_k = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([5, 3], [4, 9]))
    out = padded_attention(q, k, v, sizes, lengths_k=sizes_k, backend=backend)
    gold = padded_attention(
        *(x.double() for x in (q, k, v)), sizes, lengths_k=sizes_k, backend="reference"
    )
    torch.testing.assert_close(out.double(), gold, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "lengths", [[5, 1, 0, 20, 9], [70, 33, 129, 40, 64]], ids=["tile", "tiles"]
)
@pytest.mark.parametrize(("backend", "device", "dtype"), own_and_dtypes(flash=False))
def test_lookahead_matches_reference(backend, device, dtype, lengths):
    """Causal, both ways, and between: sequences of every kind in one call."""
    ahead = torch.tensor([0, 7, 3, lengths[3], 2], dtype=torch.int32, device=device)
    check(backend, device, dtype, lengths, causal=True, lookahead=ahead)


def test_lookahead_joins_causal_sequences_and_others():
    inputs = make_inputs([6, 9], dtype=torch.float64)
    (cu, longest), _ = bounds([6, 9])
    ahead = torch.tensor([0, 9], dtype=torch.int32)
    both = varlen_attention(*inputs, cu, longest, causal=True, lookahead=ahead)
    causal = varlen_attention(*inputs, cu, longest, causal=True)
    free = varlen_attention(*inputs, cu, longest)
    torch.testing.assert_close(both, torch.cat([causal[:6], free[6:]]))
