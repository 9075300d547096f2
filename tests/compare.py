"""How close is close enough: a kernel may err no more than eager PyTorch does in the same dtype."""

import torch
from torch import Tensor

# Twice eager's own error: another order of the same float32 sums.
FACTOR = 2.0


def assert_no_worse(
    name: str,
    actual: Tensor,
    eager: Tensor,
    gold: Tensor,
    dtype: torch.dtype,
    *,
    terms: Tensor | float = 0.0,
) -> None:
    """|actual - gold| <= FACTOR max|eager - gold| + roundings of gold's largest value.

    Args:
        actual: The kernel's output.
        eager: The reference computed in `dtype`; it also says which dtype `actual` has.
        gold: The reference computed in float64 from the same rounded inputs.
        dtype: Of the kernel's inputs: one rounding to it, and a few of float32, are free.
        terms: Sum of the absolute terms of a sum that cancels; the float32 roundings scale with it.

    Subnormal numbers may be flushed to zero.
    """
    assert actual.shape == gold.shape, f"{name}: shape {actual.shape}, expected {gold.shape}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if gold.numel() == 0:
        return
    actual, eager, gold = (x.detach().double().cpu() for x in (actual, eager, gold))
    error = (actual - gold).abs()
    accumulator = torch.promote_types(dtype, torch.float32)
    size = gold.abs().max()
    few = 16 * torch.finfo(accumulator).eps
    allowed = FACTOR * (eager - gold).abs().max() + torch.finfo(dtype).eps * size
    allowed += few * max(float(size), float(terms)) + torch.finfo(accumulator).tiny
    if not (error <= allowed).all():  # a NaN fails as well
        at = torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)
        where = tuple(int(i) for i in at)
        raise AssertionError(
            f"{name}: |error| {error[at]:.3e} > {allowed:.3e} at {where}:"
            f" got {actual[at]:.9e}, gold {gold[at]:.9e}"
        )
