"""What becomes of a block of dot products: the pair losses and G, shared by the Triton kernels."""

import triton
import triton.language as tl
from torch import Tensor

from .._core.triton_math import softplus_sigmoid2


def as_factors(log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # (), ()
    """exp(log_scale) and bias, float32, as the kernels take them.

    A kernel's own exp errs by 2e-7, which a temperature of 117 makes ten roundings of a logit.
    """
    return log_scale.float().exp(), bias.float()


@triton.jit
def load_side(
    o,  # [N], offsets along one side of the matrix
    n,  # how many there are
    first,  # position of offset 0, for pairs without ids
    ids_ptr,
    ignore_ids_ptr,
    weight_ptr,
):
    """Ids, ignore ids and weights of `o`; what is absent has no meaning and costs nothing."""
    m = o < n
    b_ids = first + o
    b_ignore = o
    b_weight = o
    if ids_ptr is not None:
        b_ids = tl.load(ids_ptr + o, mask=m, other=0)
    if ignore_ids_ptr is not None:
        b_ignore = tl.load(ignore_ids_ptr + o, mask=m, other=0)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + o, mask=m, other=0.0)
    return b_ids, b_ignore, b_weight


@triton.jit
def pair_terms(
    b_raw,  # [BB, BN], finite
    img_side,
    txt_side,
    m_m,  # [BN], columns that exist
    scale,  # over ln 2
    bias,  # over ln 2
    HAS_IDS: tl.constexpr,
    HAS_IGNORE_IDS: tl.constexpr,
    HAS_IMG_WEIGHT: tl.constexpr,
    HAS_TXT_WEIGHT: tl.constexpr,
):
    """Weighted losses and G; in rows that exist, 0 for columns that do not.

    Rows that do not exist hold anything, infinity too; the caller drops them.
    """
    # -inf is where loss and G are 0; added to a column it masks for nothing.
    b_z = b_raw * scale + tl.where(m_m, bias, -float("inf"))[None, :]
    m_pos = img_side[0][:, None] == txt_side[0][None, :]
    if HAS_IDS:
        # Without ids there are as many rows as columns: past the end both are missing.
        m_pos = m_pos & m_m[None, :]
    b_s = tl.where(m_pos, -b_z, b_z)
    if HAS_IGNORE_IDS:
        m_ignored = (img_side[1][:, None] == txt_side[1][None, :]) & (m_pos == 0)
        b_s = tl.where(m_ignored, -float("inf"), b_s)
    b_loss, b_p = softplus_sigmoid2(b_s)
    b_g = tl.where(m_pos, -b_p, b_p)
    if HAS_IMG_WEIGHT:
        b_loss *= img_side[2][:, None]
        b_g *= img_side[2][:, None]
    if HAS_TXT_WEIGHT:
        b_loss *= txt_side[2][None, :]
        b_g *= txt_side[2][None, :]
    return b_loss, b_g
