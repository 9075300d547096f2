import pytest
import torch

from siglip2_kernels.varlen_attention import dispatch, op
from siglip2_kernels.varlen_attention.inputs import layout_of

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def test_every_rule_decides_something():
    decided = {dispatch.rule(c, n) for c in CAPABILITIES for n in (36, 64, 128, 512, 513, 1024)}
    assert decided == set(dispatch.RULES)
    assert all(rule.reason for rule in decided)


@pytest.mark.parametrize(
    ("longest", "backend"),
    [(64, "triton"), (256, "triton"), (512, "triton"), (576, "varlen_attn")],
)
def test_hopper_leaves_long_sequences_to_the_library(longest, backend):
    assert dispatch.rule((9, 0), longest).backend == backend


def test_ampere_keeps_what_fits_one_tile():
    assert [dispatch.rule((8, 0), n).backend for n in (64, 65)] == ["triton", "varlen_attn"]


@pytest.mark.parametrize("first", ["triton", "varlen_attn"])
def test_the_preferred_backend_is_tried_first(first, monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda q, layout: first)
    q = torch.empty(4, 2, 64)
    layout = layout_of(q, torch.tensor([0, 4], dtype=torch.int32), 4, None, None, None)
    names = list(op._unsupported(q, layout, False))
    assert names[0] == first
    assert sorted(names) == ["chunked", "reference", "triton", "varlen_attn"]
