import pytest
import torch

from siglip2_kernels import mean_prototype_logits, prototype_cross_entropy, sinkhorn_bias
from siglip2_kernels.prototype_cross_entropy import dispatch

X, W = torch.zeros(4, 16), torch.zeros(9, 16)
I = torch.tensor([0, 1, 1, 0])  # noqa: E741
GOOD = {"student": X, "student_weight": W, "teacher": X, "teacher_weight": W}
GOOD |= {"student_temp": 0.1, "teacher_temp": 0.04}
TEACHER = {"teacher": X, "teacher_weight": W}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": X[:, :8]}, r"need student \(T, D\), student_weight.* got \(4, 8\), \(9, 16\)"),
        ({"student": X[0]}, r"got \(16,\), \(9, 16\)"),
        ({"teacher_weight": W[:5]}, r"got \(4, 16\), \(9, 16\), \(4, 16\), \(5, 16\)"),
        ({"student_weight": W[:0], "teacher_weight": W[:0]}, "one prototype; got K=0"),
        ({"student": X.double()}, "a float32 weight for 16-bit rows; got torch.float64"),
        ({"student_weight": W.bfloat16()}, "student_weight of one floating.*got torch.float32"),
        ({"teacher_weight": W.bfloat16()}, "teacher_weight of one floating.*got torch.float32"),
        ({"teacher": X.bfloat16()}, "teacher of student's dtype, torch.float32; got torch.bfloat"),
        ({"teacher_bias": X}, r"need teacher_bias \(9,\) .* got \(4, 16\)"),
        ({"teacher_index": I[:3]}, r"need teacher_index \(4,\) of int32 or int64; got \(3,\)"),
        ({"teacher_index": I.float()}, "got .* torch.float32"),
        ({"teacher": X[:2]}, "for each student row, or teacher_index; got T=4, S=2"),
        ({"teacher": X[:0], "teacher_index": I}, "one teacher row for teacher_index; got S=0"),
        ({"token_weight": I}, r"need token_weight \(4,\) of a floating.* got \(4,\) torch.int64"),
        ({"token_weight": torch.ones(4, requires_grad=True)}, "pass token_weight.detach"),
        ({"valid_count": I}, r"need valid_count \(\) of int32 or int64; got \(4,\) torch.int64"),
        ({"valid_count": torch.tensor(2.0)}, r"need valid_count .* got \(\) torch.float32"),
        ({"teacher_bias": W[:, 0].to("meta")}, "on student's device, cpu; teacher_bias is on meta"),
        ({"student_temp": 0.0}, "need student_temp > 0; got 0.0"),
        ({"teacher_temp": -1}, "need teacher_temp > 0; got -1"),
        ({"teacher_temp": torch.ones(1)}, r"a \(\) float tensor without gradient; got \(1,\)"),
        ({"student_temp": torch.tensor(0.1, requires_grad=True)}, "got .* learned"),
        ({"student_temp": torch.tensor(0.1, device="meta")}, "student_temp is on meta"),
        ({"chunk_tokens": 0}, "need chunk_tokens >= 1, or None for the default; got 0"),
    ],
)
def test_rejects_bad_input_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(**GOOD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": X[:, :8]}, r"need teacher \(S, D\), teacher_weight \(K, D\); got \(4, 8\)"),
        ({"teacher_weight": W[:0]}, "one prototype; got K=0"),
        ({"teacher": X.double()}, "teacher and teacher_weight of one floating-point dtype"),
        ({"valid_count": I}, r"need valid_count \(\)"),
        ({"teacher_weight": W.to("meta")}, "on teacher's device, cpu; teacher_weight is on meta"),
    ],
)
@pytest.mark.parametrize("fn", [sinkhorn_bias, mean_prototype_logits])
def test_the_balancing_rejects_bad_input_by_name(fn, change, message):
    options = {"teacher_temp": 0.04} if fn is sinkhorn_bias else {}
    with pytest.raises(ValueError, match=message):
        fn(**TEACHER | options | change)


def test_sinkhorn_needs_an_iteration():
    with pytest.raises(ValueError, match="need iterations >= 1; got 0"):
        sinkhorn_bias(X, W, teacher_temp=0.04, iterations=0)
    with pytest.raises(ValueError, match="need teacher_temp > 0; got 0"):
        sinkhorn_bias(X, W, teacher_temp=0)


def test_forced_backends_never_fall_back():
    with pytest.raises(NotImplementedError, match="'cuda': there is no CUDA C"):
        prototype_cross_entropy(**GOOD, backend="cuda")
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}
    with pytest.raises(NotImplementedError, match=r"needs a CUDA tensor|got torch.float64"):
        prototype_cross_entropy(**doubles, backend="triton")
    with pytest.raises(NotImplementedError, match=r"needs a CUDA tensor|got torch.float64"):
        sinkhorn_bias(X.double(), W.double(), teacher_temp=0.04, backend="triton")


def test_an_unknown_backend_is_answered_with_all_names():
    names = "'cuda', 'triton', 'chunked', 'reference'"
    with pytest.raises(ValueError, match=f"one of {names}; got 'eager'"):
        prototype_cross_entropy(**GOOD, backend="eager")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.new_zeros(len(x), 520), "a bottleneck of at most 512, got D=520"),
        (lambda x: x.bfloat16(), "multiplies bfloat16 wrongly"),
    ],
)
def test_forced_triton_says_what_it_does_not_take(change, message):
    changed = {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}
    with pytest.raises(NotImplementedError, match=message):
        prototype_cross_entropy(**changed, backend="triton")


@pytest.mark.parametrize("D", [1, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_has_a_rule_with_a_reason(dtype, D):
    found = dispatch.rule(dtype, D)
    assert found.backend in ("triton", "chunked")
    assert found.reason


def test_every_rule_decides_something():
    dtypes = torch.bfloat16, torch.float16, torch.float32
    assert {dispatch.rule(dtype, 256) for dtype in dtypes} == set(dispatch.RULES)
    assert dispatch.rule(torch.float64, 256) is dispatch.rule(torch.bfloat16, 513) is None


def test_the_rules_and_the_kernel_agree_on_the_widest_bottleneck():
    pytest.importorskip("triton")
    from siglip2_kernels.prototype_cross_entropy import _triton

    assert _triton.MAX_D == dispatch.MAX_D
