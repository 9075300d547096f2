import pytest
import torch

from siglip2_kernels import make_plan
from siglip2_kernels.varlen_attention import _cudnn, dispatch, op
from siglip2_kernels.varlen_attention.inputs import layout_of

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def test_every_rule_decides_something():
    lengths = (36, 64, 128, 512, 513, 1024)
    decided = {dispatch.rule(c, n, e) for c in CAPABILITIES for n in lengths for e in (False, True)}
    assert decided == set(dispatch.RULES)
    assert all(rule.reason for rule in decided)


@pytest.mark.parametrize(
    ("longest", "is_equal", "forward", "backward"),
    [
        (64, True, "triton", "triton"),
        (64, False, "triton", "triton"),
        (128, True, "cudnn", "triton"),
        (512, True, "cudnn", "triton"),
        (512, False, "triton", "triton"),
        (1024, True, "cudnn", "varlen_attn"),
        (1024, False, "triton", "varlen_attn"),
    ],
)
def test_hopper_takes_the_faster_of_each_pass(longest, is_equal, forward, backward):
    found = dispatch.rule((9, 0), longest, is_equal)
    assert (found.forward, found.backward) == (forward, backward)


def test_ampere_keeps_what_fits_one_tile():
    found = [dispatch.rule((8, 0), n, True).forward for n in (64, 65)]
    assert found == ["triton", "varlen_attn"]


@pytest.mark.parametrize("first", ["triton", "varlen_attn", "cudnn"])
def test_the_preferred_backend_is_tried_first(first, monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda q, layout: dispatch.Passes(first, "triton"))
    q = torch.empty(4, 2, 64)
    layout = layout_of(q, torch.tensor([0, 4], dtype=torch.int32), 4, None, None, None)
    names = list(op._unsupported(q, layout, False))
    assert names[0] == first
    assert sorted(names) == ["chunked", "cudnn", "reference", "triton", "varlen_attn"]


@pytest.mark.parametrize(
    ("works", "backward", "expected"),
    [
        (("triton", "varlen_attn"), "varlen_attn", "varlen_attn"),
        (("triton",), "varlen_attn", "triton"),
        (("varlen_attn",), "triton", "varlen_attn"),
        ((), "triton", "cudnn"),
    ],
)
def test_the_backward_falls_to_what_takes_the_input(works, backward, expected, monkeypatch):
    passes = dispatch.Passes("cudnn", backward)
    monkeypatch.setattr(dispatch, "preferred", lambda q, layout: passes)
    reasons = {name: None if name in works else "no" for name in ("triton", "varlen_attn")}
    assert op._backward_of("cudnn", torch.empty(0), None, reasons) == expected
    assert op._backward_of("chunked", torch.empty(0), None, reasons) == "chunked"


class OfHopper:
    """What the checks read of queries (T, 2, 64) on an H100."""

    device = torch.device("cuda")
    dtype = torch.bfloat16

    def __init__(self, T, E=64):
        self.shape = (T, 2, E)


@pytest.mark.parametrize(
    ("q", "lengths", "reason"),
    [
        (OfHopper(9), [3, 3, 3], None),
        (OfHopper(9), [3, 2, 4], "a plan of sequences of one length"),
        (OfHopper(10), [3, 3, 3], "at most 65,535 sequences, and no tokens behind the last"),
        (OfHopper(3), [1, 1, 1], "sequences of more than one token"),
        (OfHopper(9, 136), [3, 3, 3], "a head width divisible by 8, up to 128; got 136"),
    ],
)
def test_cudnn_says_why_it_is_passed_over(q, lengths, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_cudnn, "HAS_CUDNN", True)
    plan = make_plan(lengths)
    here = torch.empty(0)
    layout = layout_of(here, plan.cu_seqlens, max(lengths), None, None, plan)
    found = _cudnn.unsupported(q, layout, False)
    assert found == (reason and f"needs {reason}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9.0" in _cudnn.unsupported(q, layout, False)
