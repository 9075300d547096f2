import pytest
import torch

pytestmark = pytest.mark.interpreter
triton = pytest.importorskip("triton")
tl = triton.language

from siglip2_kernels._core import triton_math  # noqa: E402

log1p, softplus, sigmoid = triton_math.log1p, triton_math.softplus, triton_math.sigmoid
merge_lse = triton_math.merge_lse
N = 4096
EPS = torch.finfo(torch.float32).eps


@triton.jit
def _log1p_kernel(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, log1p(tl.load(x_ptr + o)))


@triton.jit
def _softplus_kernel(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, softplus(tl.load(x_ptr + o)))


@triton.jit
def _sigmoid_kernel(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, sigmoid(tl.load(x_ptr + o)))


@triton.jit
def _merge_kernel(m_ptr, s_ptr, y_ptr, N: tl.constexpr):
    # Pairs (2 i, 2 i + 1) of partial sums.
    o = tl.arange(0, N)
    m, s = merge_lse(
        tl.load(m_ptr + 2 * o),
        tl.load(s_ptr + 2 * o),
        tl.load(m_ptr + 2 * o + 1),
        tl.load(s_ptr + 2 * o + 1),
    )
    tl.store(y_ptr + o, m + tl.log(s))


def relative_error(kernel, x, gold):
    y = torch.empty_like(x)
    kernel[(1,)](x, y, N=N)
    return ((y.double() - gold) / gold).abs().max()


def test_log1p_is_relatively_exact_down_to_the_smallest_argument():
    x = torch.cat([torch.linspace(0, 1, N // 2 + 1)[1:], torch.logspace(-30, 0, N // 2)])
    assert relative_error(_log1p_kernel, x, x.double().log1p()) < 4 * EPS


def test_softplus_is_relatively_exact_in_the_tail():
    x = torch.linspace(-80, 80, N)
    # exp rounds its argument's multiple of log2(e): 80 in all, half an EPS each.
    gold = x.double().exp().log1p()
    assert relative_error(_softplus_kernel, x, gold) < 80 * EPS


def test_sigmoid_is_relatively_exact_on_both_sides():
    x = torch.linspace(-80, 80, N)
    assert relative_error(_sigmoid_kernel, x, x.double().sigmoid()) < 80 * EPS


def test_merge_lse_joins_parts_and_ignores_empty_ones():
    inf = float("inf")
    parts = [(1.0, 3.0, -2.0, 5.0), (-inf, 0.0, 4.0, 2.0), (4.0, 2.0, -inf, 0.0), (-900, 1, 900, 1)]
    m, s = torch.tensor(parts).view(4, 2, 2).unbind(-1)
    m, s = m.contiguous(), s.contiguous()
    y = torch.empty(4)
    _merge_kernel[(1,)](m, s, y, N=4)
    gold = torch.logsumexp(m.double() + s.double().log(), dim=1)
    torch.testing.assert_close(y.double(), gold, rtol=4 * EPS, atol=0)


@pytest.mark.filterwarnings("ignore:(invalid|divide):RuntimeWarning")
def test_merge_lse_of_two_empty_parts_is_minus_infinity():
    y = torch.empty(1)
    _merge_kernel[(1,)](torch.full((2,), -float("inf")), torch.zeros(2), y, N=1)
    assert float(y) == -float("inf")
