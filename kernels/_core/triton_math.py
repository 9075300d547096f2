"""Elementwise math shared by the Triton kernels. float32 in, float32 out."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], within 2e-7 of its own size however small x is.

    A polynomial: Kahan's x * log(w) / (w - 1) inherits the GPU's lg2.approx, whose error near 1 is
    absolute (2^-22), 0.5% of the result at exp(-10). Degree 9, minimax in relative error.
    """
    p = -0.0032440118957310915
    p = p * x + 0.019851399585604668
    p = p * x - 0.05695941299200058
    p = p * x + 0.10603641718626022
    p = p * x - 0.1530558466911316
    p = p * x + 0.19675935804843903
    p = p * x - 0.24954132735729218
    p = p * x + 0.3332996368408203
    p = p * x - 0.4999990165233612
    p = p * x + 1.0
    return p * x


@triton.jit
def softplus_sigmoid(x):
    """(log(1 + exp(x)), 1 / (1 + exp(-x))): one exponential for both, no cancellation in either."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.maximum(x, 0.0) + log1p(e), tl.where(x >= 0, r, e * r)


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
