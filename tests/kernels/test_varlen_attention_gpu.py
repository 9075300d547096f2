"""What only a GPU can show of attention in a pack."""

import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels import make_plan, varlen_attention, varlen_qkv_attention
from siglip2_kernels.varlen_attention import reference

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
    qkv, plan = make([n for n in LENGTHS if n <= longest], 4, 72)

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


@pytest.mark.parametrize("backend", ["triton", "varlen_attn"])
def test_nothing_waits_for_the_device(backend):
    qkv, plan = make(LENGTHS, 4, 64)
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
