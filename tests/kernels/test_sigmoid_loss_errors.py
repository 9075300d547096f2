import pytest
import torch

from siglip2_kernels import pairwise_sigmoid_loss_sums, sigmoid_loss, sigmoid_loss_and_grads

X = torch.zeros(4, 16)
SCALAR = torch.tensor(0.0)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"txt": X[:, :8]}, r"need img \(B, D\), txt \(M, D\); got \(4, 16\), \(4, 8\)"),
        ({"img": X[0]}, r"got \(16,\), \(4, 16\)"),
        ({"txt": X.double()}, "one floating-point dtype; got torch.float32, torch.float64"),
        ({"img": X.int(), "txt": X.int()}, "floating-point dtype; got torch.int32"),
        ({"log_scale": SCALAR[None]}, r"need log_scale \(\); got \(1,\); pass log_scale.squeeze"),
        ({"bias": SCALAR[None]}, r"need bias \(\); got \(1,\); pass bias.squeeze"),
        ({"bias": SCALAR.int()}, "need bias of a floating-point dtype; got torch.int32"),
        ({"txt": X[:3]}, "as many captions as images .* B=4, M=3; pass img_ids and txt_ids"),
        ({"img_ids": IDS}, "need both img_ids and txt_ids, or neither; got one"),
        ({"img_ids": IDS, "txt_ids": IDS[:3]}, r"need txt_ids \(4,\) .* got \(3,\) torch.int64"),
        ({"img_ids": IDS.bool(), "txt_ids": IDS}, r"img_ids .* int32 or int64; got .* torch.bool"),
        ({"img_ids": IDS, "txt_ids": IDS.float()}, "txt_ids .* got .* torch.float32"),
        ({"txt_ignore_ids": IDS}, "both img_ignore_ids and txt_ignore_ids, or neither; got one"),
        (
            {"img_ignore_ids": IDS[:3], "txt_ignore_ids": IDS},
            r"need img_ignore_ids \(4,\) .* got \(3,\) torch.int64",
        ),
        (
            {"img_ignore_ids": IDS, "txt_ignore_ids": IDS.float()},
            "need txt_ignore_ids .* int32 or int64; got .* torch.float32",
        ),
        (
            {"img_ignore_ids": IDS, "txt_ignore_ids": IDS.to("meta")},
            "on img's device, cpu; txt_ignore_ids is on meta",
        ),
        ({"img_weight": X[:3, 0]}, r"need img_weight \(4,\) .* got \(3,\) torch.float32"),
        ({"txt_weight": IDS}, "txt_weight .* floating-point dtype; got .* torch.int64"),
        ({"txt_weight": X[0, :4].clone().requires_grad_()}, "pass txt_weight.detach"),
        ({"bias": SCALAR.to("meta")}, "on img's device, cpu; bias is on meta"),
    ],
)
@pytest.mark.parametrize("fn", [sigmoid_loss, sigmoid_loss_and_grads, pairwise_sigmoid_loss_sums])
def test_rejects_bad_input_by_name(fn, change, message):
    args = {"img": X, "txt": X, "log_scale": SCALAR, "bias": SCALAR} | change
    with pytest.raises(ValueError, match=message):
        fn(**args)


def test_rejects_an_unknown_reduction():
    for fn in (sigmoid_loss, sigmoid_loss_and_grads):
        with pytest.raises(ValueError, match="'mean' or 'sum'; got 'none'"):
            fn(X, X, SCALAR, SCALAR, reduction="none")


def test_forced_cuda_says_that_there_is_no_such_kernel():
    with pytest.raises(NotImplementedError, match="'cuda': there is no CUDA C"):
        sigmoid_loss(X, X, SCALAR, SCALAR, backend="cuda")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_forced_backend_never_falls_back_on_a_dtype_it_lacks(backend, normalize):
    with pytest.raises(
        NotImplementedError, match=rf"'{backend}': needs a CUDA tensor|got torch.float64"
    ):
        sigmoid_loss(X.double(), X.double(), SCALAR, SCALAR, backend=backend, normalize=normalize)


def test_an_unknown_backend_is_answered_with_all_names():
    names = "'cuda', 'triton', 'cublas', 'chunked', 'reference'"
    with pytest.raises(ValueError, match=f"one of {names}; got 'eager'"):
        sigmoid_loss(X, X, SCALAR, SCALAR, backend="eager")


@pytest.mark.interpreter
def test_forced_triton_rejects_columns_that_are_strided():
    with pytest.raises(NotImplementedError, match="rows of unit stride, got strides"):
        sigmoid_loss(X.T.contiguous().T, X, SCALAR, SCALAR, backend="triton")


@pytest.mark.interpreter
def test_forced_triton_rejects_bfloat16_in_the_interpreter():
    x = X.bfloat16()
    with pytest.raises(NotImplementedError, match="multiplies bfloat16 wrongly"):
        sigmoid_loss(x, x, SCALAR, SCALAR, backend="triton")
