"""Library matrix products whose sums and results are float32, whatever the inputs' dtype."""

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to hold an operand of `mm_f32`: half precision pays on a GPU only."""
    return torch.float32 if x.dtype in _HALF and not x.is_cuda else x.dtype


def unit_scale(dtype: torch.dtype) -> float:
    """Power of two for an operand in [-1, 1]: as float16 its values to 1e-9 are then normal."""
    return 2.0**15 if dtype is torch.float16 else 1.0


def mm_f32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b: float32 for half and float32 operands, float64 for float64."""
    if a.dtype not in _HALF:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def addmm_f32_(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a @ b, with `acc` float32 (float64 for float64 operands) throughout."""
    if a.dtype not in _HALF:
        acc.addmm_(a, b)
    elif not a.is_cuda:
        acc.addmm_(a.float(), b.float())
    else:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
