import pytest
import torch

from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy import dispatch, op
from siglip2_kernels.linear_cross_entropy.inputs import Options

X, W = torch.zeros(4, 16), torch.zeros(9, 16)
Y = torch.tensor([0, 8, -100, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[:, :8]}, r"need x \(T, D\), weight \(V, D\); got \(4, 8\), \(9, 16\)"),
        ({"x": X[0]}, r"got \(16,\), \(9, 16\)"),
        ({"weight": W[:0]}, "a weight of at least one word; got V=0"),
        ({"x": X.double()}, "a float32 weight for 16-bit x; got torch.float64, torch.float32"),
        ({"weight": W.bfloat16()}, "one floating-point dtype.* got torch.float32, torch.bfloat16"),
        ({"x": X.int(), "weight": W.int()}, "got torch.int32, torch.int32"),
        ({"target": Y[:3]}, r"need target \(4,\) of int32 or int64; got \(3,\) torch.int64"),
        ({"target": Y.float()}, r"need target \(4,\) .* got \(4,\) torch.float32"),
        ({"bias": W[:, :1]}, r"need bias \(9,\) of a floating-point dtype; got \(9, 1\)"),
        ({"bias": torch.zeros(9).int()}, "need bias .* got .* torch.int32"),
        ({"token_weight": Y}, r"need token_weight \(4,\) of a floating.* got \(4,\) torch.int64"),
        ({"token_weight": torch.ones(4, requires_grad=True)}, "pass token_weight.detach"),
        ({"valid_index": Y[None]}, r"need valid_index \(n,\) .* got \(1, 4\) torch.int64"),
        ({"valid_index": Y == 0}, "each token once; got .* torch.bool"),
        ({"weight_grad_out": X}, r"need weight_grad_out \(9, 16\) of torch.float32; got \(4, 16\)"),
        ({"weight_grad_out": W.bfloat16()}, r"got \(9, 16\) torch.bfloat16"),
        ({"weight_grad_out": W.clone().requires_grad_()}, "without a gradient of its own"),
        ({"target": Y.to("meta")}, "on x's device, cpu; target is on meta"),
        ({"reduction": "avg"}, "need reduction 'mean', 'sum' or 'none'; got 'avg'"),
        ({"label_smoothing": 1.5}, r"need label_smoothing within \[0, 1\]; got 1.5"),
        ({"z_loss": -1.0}, "need z_loss >= 0; got -1.0"),
        ({"softcap": 0.0}, "need softcap > 0, or None for no cap; got 0.0"),
        ({"chunk_tokens": 0}, "need chunk_tokens >= 1, or None for the default; got 0"),
        ({"chunk_tokens": 1.5}, "need chunk_tokens >= 1, or None for the default; got 1.5"),
    ],
)
def test_rejects_bad_input_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"x": X, "weight": W, "target": Y} | change)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_target_beyond_the_vocabulary_is_refused_on_the_cpu(backend):
    with pytest.raises(RuntimeError, match="index 9 is out of bounds"):
        linear_cross_entropy(X, W, Y + 1, backend=backend)


def test_forced_cuda_says_that_there_is_no_such_kernel():
    with pytest.raises(NotImplementedError, match="'cuda': there is no CUDA C"):
        linear_cross_entropy(X, W, Y, backend="cuda")


@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_forced_backend_never_falls_back_on_a_dtype_it_lacks(backend):
    with pytest.raises(
        NotImplementedError, match=rf"'{backend}': needs a CUDA tensor|got torch.float64"
    ):
        linear_cross_entropy(X.double(), W.double(), Y, backend=backend)


def test_reference_has_no_buffer():
    with pytest.raises(NotImplementedError, match="so weight_grad_out cannot take them"):
        linear_cross_entropy(X, W, Y, weight_grad_out=W.clone(), backend="reference")


def test_an_unknown_backend_is_answered_with_all_names():
    names = "'cuda', 'triton', 'cublas', 'chunked', 'reference'"
    with pytest.raises(ValueError, match=f"one of {names}; got 'eager'"):
        linear_cross_entropy(X, W, Y, backend="eager")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.T.contiguous().T}, "rows of unit stride, got strides"),
        ({"label_smoothing": 0.1, "softcap": 5.0}, "smooths labels of logits without a soft cap"),
        ({"x": X.bfloat16(), "weight": W.bfloat16()}, "multiplies bfloat16 wrongly"),
    ],
)
def test_forced_triton_says_what_it_does_not_take(change, message):
    with pytest.raises(NotImplementedError, match=message):
        linear_cross_entropy(**{"x": X, "weight": W, "target": Y, "backend": "triton"} | change)


@pytest.mark.parametrize("D", [1, 768, 1152, 1153, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_and_width_has_a_rule_with_a_reason(dtype, D):
    found = dispatch.rule(dtype, D)
    assert found.backend in ("triton", "cublas")
    assert found.reason


def test_every_rule_decides_something():
    dtypes = torch.bfloat16, torch.float16, torch.float32
    decided = {dispatch.rule(dtype, D) for dtype in dtypes for D in (768, 1536)}
    assert decided == set(dispatch.RULES)
    assert dispatch.rule(torch.float64, 768) is None


@pytest.mark.parametrize("first", ["triton", "cublas"])
def test_the_preferred_design_is_tried_first(first, monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda x: first)
    names = list(op._unsupported(X, W, Options(0.0, 0.0, None, None)))
    assert sorted(names) == ["chunked", "cublas", "cuda", "reference", "triton"]
    assert names[1] == first
