"""What only a GPU can show of attention in a pack."""

import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels import make_plan, varlen_attention, varlen_qkv_attention
from siglip2_kernels.varlen_attention import _cudnn, reference
from siglip2_kernels.varlen_attention.inputs import layout_of

pytestmark = pytest.mark.gpu
LENGTHS = [36, 0, 64, 128, 247, 256, 1, 100]


def make(lengths, H, E, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, H, E, device="cuda", generator=generator)
    return qkv.to(dtype).requires_grad_(), make_plan(lengths, device="cuda")


def out_and_grad(qkv, plan, **kwargs):
    out = varlen_qkv_attention(qkv, plan.cu_seqlens, plan.max_seqlen, plan=plan, **kwargs)
    return [out, *torch.autograd.grad(out, [qkv], torch.ones_like(out).cumsum(0) / len(out))]


@pytest.mark.parametrize("backend", ["triton", "varlen_attn"])
@pytest.mark.parametrize("E", [64, 72, 96])
@pytest.mark.parametrize("longest", [36, 64, 128, 256, 1024])
def test_bfloat16_errs_no_more_than_eager(backend, E, longest):
    lengths = [n for n in LENGTHS if n <= longest] + [longest - 1, longest]
    qkv, plan = make(lengths, 3, E)

    def eager(x):
        bounds = (plan.cu_seqlens, plan.cu_seqlens)
        scale = E**-0.5
        out, _ = reference.varlen_attention(*x.unbind(1), *bounds, causal=False, scale=scale)
        grad = (torch.ones_like(out).cumsum(0) / len(out)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [x], grad)]

    gold = eager(qkv.detach().double().requires_grad_())
    expected = eager(qkv.detach().requires_grad_())
    for name, a, e, g in zip(
        ("out", "dqkv"), out_and_grad(qkv, plan, backend=backend), expected, gold, strict=True
    ):
        assert_no_worse(name, a, e, g, torch.bfloat16)


# Up to 256 keys FlashAttention adds two parts of dq atomically: either order gives the same bits.
@pytest.mark.parametrize("backend", ["triton", "varlen_attn"])
@pytest.mark.parametrize("longest", [64, 256])
def test_a_cuda_graph_replays_forward_and_backward(backend, longest):
    check_graph(*make([n for n in LENGTHS if n <= longest], 4, 72), backend)


def test_a_cuda_graph_replays_the_default_of_one_length():
    qkv, plan = make([256] * 3, 4, 72)
    needs_cudnn(qkv, plan)
    check_graph(qkv, plan, None)


def check_graph(qkv, plan, backend):
    def run():
        # A leaf's gradient node belongs to the stream that it was made on: each run has a leaf of
        # its own, and no graph outlives it, or the capture would depend on another stream.
        leaf = qkv.detach().requires_grad_()
        return [x.detach() for x in out_and_grad(leaf, plan, backend=backend)]

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in captured:
            x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def needs_cudnn(qkv, plan):
    q = qkv[:, 0]
    layout = layout_of(q, plan.cu_seqlens, plan.max_seqlen, None, None, plan)
    reason = _cudnn.unsupported(q, layout, False)
    if reason is not None:
        pytest.skip(f"cudnn: {reason}")


def eager_and_gold(qkv, plan, causal=False):
    """Output and gradient by the specification, in the inputs' dtype and in float64."""

    def run(x):
        bounds = (plan.cu_seqlens, plan.cu_seqlens)
        options = {"causal": causal, "scale": x.shape[3] ** -0.5}
        out, lse = reference.varlen_attention(*x.unbind(1), *bounds, **options)
        grad = (torch.ones_like(out).cumsum(0) / len(out)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [x], grad)], lse.detach()

    return run(qkv.detach().requires_grad_()), run(qkv.detach().double().requires_grad_())


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("backend", [None, "cudnn"])
@pytest.mark.parametrize("E", [64, 72, 128])
@pytest.mark.parametrize("length", [130, 256, 576])
def test_sequences_of_one_length_match_reference(backend, E, length, causal):
    """`None` is cuDNN's forward, and a backward of another's that reads its log-sum-exp."""
    qkv, plan = make([length] * 3, 2, E)
    needs_cudnn(qkv, plan)
    (eager, eager_lse), (gold, gold_lse) = eager_and_gold(qkv, plan, causal)
    found = out_and_grad(qkv, plan, backend=backend, causal=causal)
    for name, a, e, g in zip(("out", "dqkv"), found, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, torch.bfloat16)
    _, lse = varlen_attention(
        *qkv.detach().unbind(1),
        plan.cu_seqlens,
        plan.max_seqlen,
        plan=plan,
        causal=causal,
        backend="cudnn",
        return_lse=True,
    )
    assert_no_worse("lse", lse, eager_lse, gold_lse, torch.bfloat16)


def test_sequences_of_one_length_take_keys_of_another():
    q, k, v = (torch.randn(3 * n, 2, 64, device="cuda").bfloat16() for n in (76, 256, 256))
    plan = make_plan([76] * 3, [256] * 3, device="cuda")
    layout = layout_of(q, plan.cu_seqlens, 76, plan.cu_seqlens_k, 256, plan)
    reason = _cudnn.unsupported(q, layout, False)
    if reason is not None:
        pytest.skip(f"cudnn: {reason}")
    keys = {"cu_seqlens_k": plan.cu_seqlens_k, "max_seqlen_k": 256, "plan": plan}

    def run(fn, dtype=torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = fn(*inputs)
        grad = (torch.ones_like(out).cumsum(0) / len(out)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    bounds = (plan.cu_seqlens, plan.cu_seqlens_k)
    spec = lambda *x: reference.varlen_attention(*x, *bounds, scale=0.125)[0]
    eager, gold = run(spec), run(spec, torch.float64)
    for backend in (None, "cudnn"):
        found = run(lambda *x, b=backend: varlen_attention(*x, bounds[0], 76, backend=b, **keys))
        for name, a, e, g in zip(("out", "dq", "dk", "dv"), found, eager, gold, strict=True):
            assert_no_worse(name, a, e, g, torch.bfloat16)


def test_the_default_of_one_length_is_deterministic_and_cudnn_s_forward():
    qkv, plan = make([256] * 4, 4, 72)
    needs_cudnn(qkv, plan)
    first, second = (out_and_grad(qkv, plan) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], out_and_grad(qkv, plan, backend="cudnn")[0])


def test_the_default_of_one_length_compiles_whole():
    qkv, plan = make([256] * 4, 4, 72)
    needs_cudnn(qkv, plan)
    fn = lambda x, plan: varlen_qkv_attention(x, plan.cu_seqlens, plan.max_seqlen, plan=plan)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    found, expected = (
        [f(qkv, plan), *torch.autograd.grad(f(qkv, plan).sum(), qkv)] for f in (compiled, fn)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("backend", "lengths"),
    [("triton", LENGTHS), ("varlen_attn", LENGTHS), (None, [256] * 3), ("cudnn", [256] * 3)],
)
def test_nothing_waits_for_the_device(backend, lengths):
    qkv, plan = make(lengths, 4, 64)
    if backend == "cudnn":
        needs_cudnn(qkv, plan)
    out_and_grad(qkv, plan, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_and_grad(qkv, plan, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_mix_of_one_bucket_compiles_nothing():
    from siglip2_kernels.varlen_attention import _backward_triton, _triton

    kernels = (_triton._fwd_kernel, _backward_triton.tile_kernel, _backward_triton.loop_kernel)
    count = lambda: sum(len(c[0]) for kernel in kernels for c in kernel.device_caches.values())
    out_and_grad(*make([250, 130, 7], 4, 64), backend="triton")
    before = count()
    for lengths in ([256], [200, 1], [129] * 33, [140, 0, 255, 16]):
        out_and_grad(*make(lengths, 4, 64), backend="triton")
    assert count() == before


def test_offsets_beyond_two_to_the_31():
    """The last of many sequences: its first element lies behind 2^31."""
    lengths, H, E = [1024] * 700, 16, 64
    qkv, plan = make(lengths, H, E)
    assert qkv.numel() > 2**31
    with torch.no_grad():
        out = varlen_qkv_attention(qkv, plan.cu_seqlens, 1024, plan=plan, backend="triton")
        q, k, v = qkv[-1024:].unbind(1)
        cu = torch.tensor([0, 1024], dtype=torch.int32, device="cuda")
        alone = varlen_attention(q, k, v, cu, 1024, backend="triton")
    assert torch.equal(out[-1024:], alone)
