"""Elementwise math shared by the Triton kernels. float32 in, float32 out."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], within 4e-7 of its own size however small x is.

    A polynomial: Kahan's x * log(w) / (w - 1) inherits the GPU's lg2.approx, whose error near 1 is
    absolute (2^-22), 0.5% of the result at exp(-10). Degree 8, minimax in relative error.
    """
    p = -0.008539210073649883
    p = p * x + 0.04408963397145271
    p = p * x - 0.10768171399831772
    p = p * x + 0.17745241522789001
    p = p * x - 0.24495463073253632
    p = p * x + 0.33275479078292847
    p = p * x - 0.4999740421772003
    p = p * x + 0.9999998211860657
    return p * x


@triton.jit
def softplus_sigmoid2(x):
    """(log(1 + 2^x), 1 / (1 + 2^-x)): one exponential for both, no cancellation in either.

    The argument comes in units of ln 2, which a caller folds into its scale. exp2 and rsqrt are one
    instruction each; exp and a division are four and six, and this is the loss kernels' inner loop.
    """
    e = tl.exp2(-tl.abs(x))
    w = 1.0 + e
    r = tl.rsqrt(w * w)
    return tl.maximum(x, 0.0) * LN_2 + log1p(e), tl.where(x >= 0, 1.0, e) * r


@triton.jit
def softplus_sigmoid(x):
    """(log(1 + exp(x)), 1 / (1 + exp(-x)))."""
    return softplus_sigmoid2(x * LOG2_E)


@triton.jit
def softplus(x):
    return softplus_sigmoid(x)[0]


@triton.jit
def sigmoid(x):
    return softplus_sigmoid(x)[1]


@triton.jit
def merge_lse(m_a, s_a, m_b, s_b):
    """Join two partial log-sum-exps held as (max, sum of exp(x - max)); (-inf, 0) is empty."""
    m = tl.maximum(m_a, m_b)
    # exp(-inf - -inf) would be NaN: an empty part has the sum 0 already.
    a = tl.where(s_a > 0, s_a * tl.exp(m_a - m), 0.0)
    b = tl.where(s_b > 0, s_b * tl.exp(m_b - m), 0.0)
    return m, a + b
