import pytest
import torch

from siglip2_kernels.sigmoid_loss import dispatch, op

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_device_and_dtype_has_a_rule_with_a_reason(capability, dtype):
    found = dispatch.rule(capability, dtype)
    assert found.backend in ("triton", "cublas")
    assert found.reason


def test_every_rule_decides_something():
    decided = {dispatch.rule(capability, dtype) for capability in CAPABILITIES for dtype in DTYPES}
    assert decided == set(dispatch.RULES)


def test_float64_has_no_rule():
    assert dispatch.rule((9, 0), torch.float64) is None


def test_hopper_takes_what_was_measured_to_be_faster():
    assert dispatch.rule((9, 0), torch.bfloat16).backend == "triton"
    assert dispatch.rule((10, 0), torch.bfloat16).backend == "cublas"


@pytest.mark.parametrize("first", ["triton", "cublas"])
def test_the_preferred_design_is_tried_first(first, monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda img: first)
    names = list(op._unsupported(torch.empty(2, 4), torch.empty(2, 4)))
    assert sorted(names) == ["chunked", "cublas", "cuda", "reference", "triton"]
    assert names[1] == first
