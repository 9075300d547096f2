"""Triton kernel of `scaled`: one pass over memory, in vectors whatever the number of elements."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 4096, 4


@triton.jit(do_not_specialize=["scale_ptr", "n"])
def _scaled_kernel(d_ptr, scale_ptr, out_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    scale = tl.load(scale_ptr)
    o = tl.arange(0, BLOCK)
    d_ptr += start
    out_ptr += start
    if start + BLOCK <= n:  # a mask would cost the vectors
        b_out = tl.load(d_ptr + o) * scale
        tl.store(out_ptr + o, b_out.to(out_ptr.dtype.element_ty))
    else:
        m = o < n - start
        b_out = tl.load(d_ptr + o, mask=m, other=0.0) * scale
        tl.store(out_ptr + o, b_out.to(out_ptr.dtype.element_ty), mask=m)


def scaled(
    d: Tensor,  # float32, contiguous
    scale: Tensor,  # () float32
    out: Tensor,  # contiguous, written
) -> None:
    if n := d.numel():
        grid = (triton.cdiv(n, BLOCK),)
        _scaled_kernel[grid](d, scale, out, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
