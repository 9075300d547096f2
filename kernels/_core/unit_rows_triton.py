"""Triton kernels of `unit_rows`: one program a row, which is read once and kept in registers."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unit_rows_kernel(
    x_ptr,
    u_ptr,
    stride_x,
    stride_xd,
    D: tl.constexpr,
    BD: tl.constexpr,
    EPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    p_x = x_ptr + row * stride_x + o_d * stride_xd
    b_x = tl.load(p_x, mask=o_d < D, other=0.0).to(tl.float32)  # [BD]
    b_u = b_x / (tl.sqrt(tl.sum(b_x * b_x)) + EPS)
    tl.store(u_ptr + row * D + o_d, b_u.to(u_ptr.dtype.element_ty), mask=o_d < D)


@triton.jit
def _unit_rows_grad_kernel(
    d_ptr,
    x_ptr,
    scale_ptr,
    dx_ptr,
    stride_x,
    stride_xd,
    D: tl.constexpr,
    BD: tl.constexpr,
    EPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    p_x = x_ptr + row * stride_x + o_d * stride_xd
    b_x = tl.load(p_x, mask=o_d < D, other=0.0).to(tl.float32)  # [BD]
    b_d = tl.load(d_ptr + row * D + o_d, mask=o_d < D, other=0.0)  # [BD]
    norm = tl.sqrt(tl.sum(b_x * b_x))
    inverse = 1.0 / (norm + EPS)
    # The row 0 has no direction; 1 stands for its norm so that nothing divides by 0.
    along = tl.sum(b_x * b_d) * inverse / tl.where(norm > 0, norm, 1.0)
    b_dx = tl.load(scale_ptr) * inverse * (b_d - b_x * along)
    tl.store(dx_ptr + row * D + o_d, b_dx.to(dx_ptr.dtype.element_ty), mask=o_d < D)


def config(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"BD": BD, "num_warps": min(max(BD // 256, 1), 8)}


def unit_rows(
    x: Tensor,  # (B, D)
    u: Tensor,  # (B, D) contiguous, written
    eps: float,
) -> None:
    B, D = x.shape
    if B * D:
        _unit_rows_kernel[(B,)](x, u, *x.stride(), D=D, EPS=eps, **config(D))


def unit_rows_grad(
    d: Tensor,  # (B, D) float32
    x: Tensor,  # (B, D)
    scale: Tensor,  # () float32
    dx: Tensor,  # (B, D) contiguous, written
    eps: float,
) -> None:
    B, D = x.shape
    if B * D:
        d = d.contiguous()
        _unit_rows_grad_kernel[(B,)](d, x, scale, dx, *x.stride(), D=D, EPS=eps, **config(D))
