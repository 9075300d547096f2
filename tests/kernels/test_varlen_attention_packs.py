"""What a pack promises: sequences do not see one another, nor does their order count."""

import pytest
import torch

from siglip2_kernels import make_plan, uniform_plan, varlen_attention, varlen_qkv_attention
from siglip2_kernels._core.varlen import cu_seqlens_from_lengths
from strategies import RUNNERS

OWN = [
    runner
    for runner in RUNNERS
    if runner.values in (("chunked", "cpu"), ("triton", "cpu"), ("triton", "cuda"))
]
PACKS = pytest.mark.parametrize("lengths", [[5, 64, 0, 20], [150, 3, 129]], ids=["tile", "tiles"])


def make_qkv(lengths, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(sum(lengths), 3, 2, 32, generator=g).to(device, dtype)


def value_and_grad(qkv, lengths, backend, **options):
    """The pack's output and gradient; each token's upstream gradient is its own query."""
    dout = qkv[:, 0].detach().nan_to_num(0, 0, 0)
    qkv = qkv.detach().requires_grad_()
    cu = cu_seqlens_from_lengths(lengths, qkv.device)
    longest = max(lengths, default=0)
    out = varlen_qkv_attention(qkv, cu, longest, backend=backend, **options)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@PACKS
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_each_sequence_alone_equals_it_in_the_pack(backend, device, lengths):
    qkv = make_qkv(lengths, device)
    packed = value_and_grad(qkv, lengths, backend)
    for rows in zip(*(x.split(lengths) for x in (qkv, *packed)), strict=True):
        alone = value_and_grad(rows[0], [len(rows[0])], backend)
        for a, b in zip(alone, rows[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@PACKS
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_the_order_of_sequences_does_not_count(backend, device, lengths):
    qkv = make_qkv(lengths, device)
    forward = value_and_grad(qkv, lengths, backend)
    flipped = torch.cat(qkv.split(lengths)[::-1])
    backward = value_and_grad(flipped, lengths[::-1], backend)
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a, torch.cat(b.split(lengths[::-1])[::-1]))


@PACKS
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_a_plan_changes_no_bit(backend, device, lengths):
    qkv = make_qkv(lengths, device)
    with_plan = value_and_grad(qkv, lengths, backend, plan=make_plan(lengths, device=device))
    for a, b in zip(with_plan, value_and_grad(qkv, lengths, backend), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=["inf", "nan"])
@PACKS
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_a_neighbour_s_infinities_do_not_leak(backend, device, lengths, poison):
    qkv = make_qkv(lengths, device)
    first, second = lengths[:2]
    bad = qkv.clone()
    bad[first : first + second] = poison
    pairs = zip(
        value_and_grad(bad, lengths, backend), value_and_grad(qkv, lengths, backend), strict=True
    )
    for a, b in pairs:
        assert torch.equal(a[:first], b[:first])
        assert torch.equal(a[first + second :], b[first + second :])


@PACKS
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_tokens_past_the_last_sequence_are_zero(backend, device, lengths):
    qkv = make_qkv(lengths, device)
    longer = torch.cat((qkv, torch.full_like(qkv[:37], torch.inf)))
    whole, part = (value_and_grad(x, lengths, backend) for x in (longer, qkv))
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[: len(qkv)], b)
        assert (a[len(qkv) :] == 0).all()
    cu = cu_seqlens_from_lengths(lengths, device)
    _, lse = varlen_attention(*longer.unbind(1), cu, max(lengths), return_lse=True, backend=backend)
    assert (lse[:, len(qkv) :] == -torch.inf).all()


@PACKS
@pytest.mark.parametrize(("backend", "device"), OWN)
def test_two_runs_are_bit_equal(backend, device, lengths):
    qkv = make_qkv(lengths, device)
    runs = [value_and_grad(qkv, lengths, backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("backend", "device"), OWN)
def test_opcheck_and_fullgraph(backend, device):
    lengths = [3, 5]
    qkv = make_qkv(lengths, device).requires_grad_()
    plan = make_plan(lengths, device=device)
    layout = (plan.cu_seqlens, plan.cu_seqlens, None, None, None, plan.tiles, plan.order)
    args = ([qkv], *layout, plan.max_seqlen, plan.max_seqlen_k, False, 0.1, backend, backend)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.siglip2.varlen_attention.default, args, test_utils=utils)
    torch.library.opcheck(
        torch.ops.siglip2.varlen_attention.default,
        (list(qkv.unbind(1)), *args[1:]),
        test_utils=utils,
    )
    fn = lambda x: varlen_qkv_attention(x, plan.cu_seqlens, 5, plan=plan, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    found, expected = ([f(qkv), *torch.autograd.grad(f(qkv).sum(), qkv)] for f in (compiled, fn))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_packs_of_one_bucket_compile_once():
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph

    fn = torch.compile(
        lambda x, plan: varlen_qkv_attention(x, plan.cu_seqlens, plan.max_seqlen, plan=plan),
        fullgraph=True,
        backend=count,
    )
    for lengths in ([20, 7, 5], [1, 1, 30], [9, 18, 5]):
        plan = make_plan(lengths, device="cpu")
        qkv = make_qkv(lengths)
        torch.testing.assert_close(
            fn(qkv, plan), varlen_qkv_attention(qkv, plan.cu_seqlens, 30, backend="reference")
        )
    assert len(frames) == 1
    for lengths in ([100, 30, 3], [200, 40], [300, 20, 10, 90], [25, 9], [1000, 300]):
        plan = make_plan(lengths, device="cpu")
        fn(make_qkv(lengths), plan)
    # Sizes become symbols; a switch of backends by length may cost one more.
    assert len(frames) <= 4


def test_a_plan_lists_each_tile_once_longest_first():
    plan = make_plan([5, 300, 0, 130, 129], device="cpu")
    tiles = [t for t in plan.tiles.tolist() if t[0] >= 0]
    assert tiles == [[1, 0], [1, 1], [1, 2], [3, 0], [3, 1], [4, 0], [4, 1], [0, 0]]
    assert plan.order.tolist() == [1, 3, 4, 0, 2]
    assert (plan.max_seqlen, plan.max_seqlen_k) == (512, 512)
    cross = make_plan([5, 0], [70, 1], device="cpu")
    assert (cross.max_seqlen, cross.max_seqlen_k) == (16, 128)
    assert cross.cu_seqlens_k.tolist() == [0, 70, 71]
    assert not cross.is_equal


def test_a_plan_knows_sequences_of_one_length():
    """Their lengths are not rounded, so the host knows where each lies."""
    for plan in (make_plan([196] * 3), uniform_plan(3, 196)):
        assert (plan.is_equal, plan.max_seqlen, plan.max_seqlen_k) == (True, 196, 196)
    cross = make_plan([76, 76], [196, 196])
    assert (cross.is_equal, cross.max_seqlen, cross.max_seqlen_k) == (True, 76, 196)
    for lengths, lengths_k in (([3, 4], None), ([3, 3], [4, 5]), ([], None), ([0, 0], None)):
        assert not make_plan(lengths, lengths_k).is_equal


def test_lists_of_tiles_have_few_lengths():
    sizes = {make_plan([64] * n, device="cpu").tiles.shape[0] for n in range(1, 1025)}
    assert len(sizes) <= 50
    for n in (1, 9, 70, 999):
        assert make_plan([64] * n).tiles.shape[0] <= max(-(-n // 8) * 8, n * 9 / 8)
