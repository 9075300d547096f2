"""Eager backend: rows in chunks, so that bytes never exist as floats all at once. Any device.

Also the backward of every backend: its products are library products, with float32 sums.
"""

import torch
from torch import Tensor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, product_dtype

MAX_ELEMENTS = 1 << 24  # of a chunk of patches or tokens
# On a GPU the weight's gradient is one product where it can: 268 MB of operand at the most.
MAX_ELEMENTS_BWD_CUDA = 1 << 27


def unsupported(patches: Tensor, weight: Tensor) -> str | None:
    return None


def unit(patches: Tensor) -> float:
    """What `centred` values are to be multiplied by."""
    return 1 / 255 if patches.dtype is torch.uint8 else 1.0


def centred(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as 2 x - 255: odd integers below 256, exact in bfloat16, and 255 (x / 127.5 - 1)."""
    if patches.dtype is torch.uint8:
        # One pass: bytes are widened as they are read, and rounded once.
        return torch.add(torch.tensor(-255, dtype=dtype), patches, alpha=2)
    return patches.to(dtype)


def _operands(patches: Tensor, dtype: torch.dtype) -> torch.dtype:
    return product_dtype(torch.empty(0, dtype=dtype, device=patches.device))


def fwd(
    patches: Tensor,  # (T, K)
    weight: Tensor,  # (D, K)
    bias: Tensor,  # (D,)
    posemb: Tensor | None,  # (T, D)
    mask: Tensor | None,  # (T,)
    mask_token: Tensor | None,  # (D,)
    dtype: torch.dtype,
) -> Tensor:  # (T, D)
    T, (D, K) = patches.shape[0], weight.shape
    out = patches.new_empty(T, D, dtype=dtype)
    weight = weight.to(dtype).to(_operands(patches, dtype))
    for start, stop in row_chunks(T, max(D, K), MAX_ELEMENTS):
        rows = slice(start, stop)
        y = mm_f32(centred(patches[rows], dtype).to(weight.dtype), weight.T)
        y = y.mul_(unit(patches)).add_(bias)
        if mask is not None:
            y = torch.where(mask[rows, None], mask_token.to(y.dtype), y)
        out[rows] = y if posemb is None else y.add_(posemb[rows])
    return out


def _max_elements_bwd(dout: Tensor) -> int:
    return MAX_ELEMENTS_BWD_CUDA if dout.is_cuda else MAX_ELEMENTS


def bwd(
    dout: Tensor,  # (T, D)
    patches: Tensor,  # (T, K)
    weight: Tensor,  # (D, K)
    mask: Tensor | None,  # (T,)
    needs_dpatches: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dpatches (T, K) or (0, K), dweight (D, K) or (0, K), dbias (D,), dmask_token (D,)."""
    T, (D, K) = patches.shape[0], weight.shape
    dtype, acc = dout.dtype, torch.promote_types(dout.dtype, torch.float32)
    dpatches = patches.new_empty(T if needs_dpatches else 0, K, dtype=patches.dtype)
    dweight = weight.new_zeros(D if needs_dweight else 0, K, dtype=acc)
    dbias, dmask_token = (dout.new_zeros(D, dtype=acc) for _ in range(2))
    operands = _operands(patches, dtype)
    for start, stop in row_chunks(T, max(D, K), _max_elements_bwd(dout)):
        rows = slice(start, stop)
        d = dout[rows]
        if mask is not None:
            dmask_token += torch.where(mask[rows, None], d, 0).sum(0, dtype=acc)
            d = torch.where(mask[rows, None], 0, d)
        dbias += d.sum(0, dtype=acc)
        d = d.to(operands)
        if needs_dweight:
            x = centred(patches[rows], dtype).to(operands)
            if start == 0:
                mm_f32(d.T, x, out=dweight)
            else:
                addmm_f32_(dweight, d.T, x)
        if needs_dpatches:
            dpatches[rows] = mm_f32(d, weight.to(dtype).to(operands))
    return dpatches, dweight.mul_(unit(patches)), dbias, dmask_token
