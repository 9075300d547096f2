"""Rows that a library's attention leaves: cleared, or placed into one tensor of gradients."""

import pytest
import torch

pytest.importorskip("triton")

from siglip2_kernels._core.varlen import cu_seqlens_from_lengths
from siglip2_kernels.varlen_attention._rows_triton import clear_past, place
from strategies import RUNNERS

TRITON = [runner for runner in RUNNERS if runner.values[0] == "triton"]
SHAPES = pytest.mark.parametrize(
    ("T", "lengths", "H", "E"),
    [(1, [1], 1, 8), (37, [5, 0, 20], 3, 72), (1500, [1025], 2, 16), (9, [], 2, 24)],
)


@SHAPES
@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_rows_past_the_last_sequence_are_cleared(backend, device, T, lengths, H, E):
    out, lse = torch.randn(T, H, E, device=device).half(), torch.randn(H, T, device=device)
    lse[0, 0] = torch.inf
    end = sum(lengths)
    expected, expected_lse = out.clone(), lse.clone()
    expected[end:], expected_lse[:, end:], expected_lse[0, 0] = 0, -torch.inf, -torch.inf
    out[end:], lse[:, end:] = torch.nan, torch.nan
    clear_past(out, lse, cu_seqlens_from_lengths(lengths, device))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@SHAPES
@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_rows_are_placed_into_a_slice(backend, device, T, lengths, H, E):
    x, out = (torch.randn(*s, device=device).half() for s in ((T, H, E), (T, 3, H, E)))
    end = sum(lengths)
    x[end:] = torch.nan
    expected = out.clone()
    expected[:end, 1], expected[end:, 1] = x[:end], 0
    place(x, out[:, 1], cu_seqlens_from_lengths(lengths, device))
    assert torch.equal(out, expected)
