"""Every message of attention in a pack."""

import pytest
import torch

from siglip2_kernels import make_plan, padded_attention, varlen_attention, varlen_qkv_attention
from siglip2_kernels._core.varlen import cu_seqlens_from_lengths


@pytest.fixture
def qkv():
    return torch.randn(5, 3, 2, 16)


@pytest.fixture
def cu():
    return cu_seqlens_from_lengths([3, 2])


def test_rejects_wrong_shapes(qkv, cu):
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match=r"need q \(T, H, E\), k and v \(S, H, E\); got"):
        varlen_attention(q, k[:, :1], v[:, :1], cu, 3)
    with pytest.raises(ValueError, match=r"need qkv \(T, 3, H, E\); got \(5, 2, 2, 16\)"):
        varlen_qkv_attention(qkv[:, :2], cu, 3)
    with pytest.raises(ValueError, match=r"cu_seqlens \(B\+1,\) int32; got \(3,\) torch.int64"):
        varlen_attention(q, k, v, cu.long(), 3)
    with pytest.raises(ValueError, match="as many sequences of keys as of queries; got 2 and 1"):
        varlen_attention(q, k, v, cu, 3, cu_seqlens_k=cu[:2], max_seqlen_k=3)
    with pytest.raises(ValueError, match="cu_seqlens_k and max_seqlen_k together"):
        varlen_attention(q, k, v, cu, 3, cu_seqlens_k=cu)


def test_rejects_wrong_dtypes_and_devices(qkv, cu):
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match=r"one float dtype; got torch.float32, torch.float64"):
        varlen_attention(q, k.double(), v, cu, 3)
    with pytest.raises(ValueError, match="need q, k, v on one device; got cpu, meta, cpu"):
        varlen_attention(q, k.to("meta"), v, cu, 3)
    with pytest.raises(ValueError, match="need cu_seqlens on q's device, cpu; got meta"):
        varlen_attention(q, k, v, cu.to("meta"), 3)


def test_rejects_a_scale_that_is_not_positive(qkv, cu):
    with pytest.raises(ValueError, match=r"need scale > 0; got -1.0"):
        varlen_qkv_attention(qkv, cu, 3, scale=-1)


def test_rejects_a_plan_of_other_sequences(qkv, cu):
    for lengths in ([3], [3, 2, 1]):
        with pytest.raises(ValueError, match="need the plan of these sequences"):
            varlen_qkv_attention(qkv, cu, 3, plan=make_plan(lengths))
    with pytest.raises(ValueError, match=r"\(2, 300, 300\); its own are \(2, 16, 16\)"):
        varlen_qkv_attention(qkv, cu, 300, plan=make_plan([3, 2]))
    with pytest.raises(ValueError, match="need plan on cpu; got meta"):
        varlen_qkv_attention(qkv, cu, 3, plan=make_plan([3, 2], device="meta"))
    with pytest.raises(ValueError, match="as many lengths of keys as of queries; got 2 and 1"):
        make_plan([3, 2], [4])


def test_rejects_wrong_padded_input(qkv):
    q, lengths = qkv[None, :, 0], torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"need q \(B, N, H, E\), k and v \(B, M, H, E\)"):
        padded_attention(q, q[0], q[0], lengths)
    with pytest.raises(ValueError, match=r"need lengths_k where keys have other rows .* got 4, 5"):
        padded_attention(q, q[:, :4], q[:, :4], lengths)
    with pytest.raises(
        ValueError, match=r"need lengths \(1,\) int32 on cpu; got \(1,\) torch.int64"
    ):
        padded_attention(q, q, q, lengths.long())


def test_backends_say_why_they_do_not_run(qkv, cu):
    for backend in ("varlen_attn", "cudnn"):
        with pytest.raises(NotImplementedError, match=f"backend '{backend}': needs a CUDA tensor"):
            varlen_qkv_attention(qkv, cu, 3, backend=backend)
    with pytest.raises(ValueError, match="one of 'triton', 'varlen_attn', 'cudnn', 'chunked'"):
        varlen_qkv_attention(qkv, cu, 3, backend="flash")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("E", "dtype"), [(20, torch.float32), (136, torch.float32), (16, torch.float64)]
)
def test_triton_says_which_widths_and_dtypes_it_takes(cu, E, dtype):
    qkv = torch.zeros(5, 3, 2, E, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"got {E if dtype is torch.float32 else dtype}"):
        varlen_qkv_attention(qkv, cu, 3, backend="triton")


@pytest.mark.gpu
def test_eager_on_the_cpu_only(qkv, cu):
    with pytest.raises(NotImplementedError, match="lengths read on the host, got cuda"):
        varlen_qkv_attention(qkv.cuda(), cu.cuda(), 3, backend="chunked")


def test_rejects_wrong_lookahead(qkv, cu):
    ahead = torch.zeros(cu.shape[0] - 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="need causal=True with lookahead"):
        varlen_qkv_attention(qkv, cu, 9, lookahead=ahead)
    with pytest.raises(ValueError, match=r"need lookahead \(\d+,\) int32 on cpu; got"):
        varlen_qkv_attention(qkv, cu, 9, causal=True, lookahead=ahead.long())
