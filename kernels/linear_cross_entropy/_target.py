"""What each token's target contributes, outside of any tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["target_ptr"])
def _target_kernel(
    x_ptr,
    weight_ptr,
    target_ptr,
    z_ptr,
    stride_x,
    stride_w,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.load(target_ptr + row).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_x = tl.load(x_ptr + row * stride_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BD]
    b_w = tl.load(weight_ptr + word * stride_w + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(z_ptr + row, tl.sum(b_x * b_w))


def config(D: int) -> dict[str, int]:
    BD = triton.next_power_of_2(D)
    return {"BD": BD, "num_warps": min(max(BD // 256, 1), 8)}


def target_logits(
    x: Tensor,  # (T, D), rows of unit stride, as of the weight
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (T,) int64
    softcap: float | None,
) -> Tensor:  # (T,) float32
    (T, D), z = x.shape, torch.empty(len(target), dtype=torch.float32, device=x.device)
    strides = x.stride(0), weight.stride(0)
    _target_kernel[(T,)](x, weight, target, z, *strides, D=D, **config(D))
    if bias is not None:
        z += bias.float().index_select(0, target)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def patch_of_target(
    z: Tensor,  # (n,) the target's logit
    against: Tensor,  # (n,) log((1 - p) / p) of its probability p
    hit: Tensor,  # (n,) what is taken from p
    scale: Tensor,  # (n,) softmax over E
    softcap: float | None,
) -> Tensor:  # (n,)
    """E at the target such that scale * E is p - hit, times the cap's slope."""
    patch = ((1 - hit) - torch.sigmoid(against)) / scale
    if softcap is None:
        return patch
    t = z / softcap
    return patch * (1 - t) * (1 + t)
