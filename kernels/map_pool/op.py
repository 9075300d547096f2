"""Attention pooling with one probe for all sequences (MAP head; big_vision), in absorbed form.

    q = Wq probe + bq,    u_h = Wk_h^T q_h / sqrt(E),    p = softmax_n(x_n . u_h)
    m_h = sum_n p_hn x_n,    pooled_h = Wv_h m_h + bv_h

equals softmax(q K^T / sqrt(E)) V with K = Wk x + bk and V = Wv x + bv: bk shifts all scores of a
head alike, and the weights sum to 1. No keys, no values: 4 T H D FLOPs instead of 4 T D^2, and
T H scores instead of 2 T D activations are kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.backend import Backend, choose, no_triton
from . import _chunked, reference
from .inputs import check

_SIZES = "Tensor cu_seqlens, SymInt max_seqlen, str backend"
torch.library.define(
    "siglip2::map_pool", f"(Tensor x, Tensor u, {_SIZES}) -> (Tensor m, Tensor s, Tensor lse)"
)
torch.library.define(
    "siglip2::map_pool_bwd",
    f"(Tensor dm, Tensor x, Tensor u, Tensor m, Tensor s, Tensor lse, {_SIZES})"
    " -> (Tensor dx, Tensor du)",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return _chunked


@torch.library.impl("siglip2::map_pool", "CompositeExplicitAutograd")
def _(x, u, cu_seqlens, max_seqlen, backend):
    if x.shape[0] == 0 or cu_seqlens.shape[0] == 1:
        acc = u.dtype
        B, T, (H, D) = cu_seqlens.shape[0] - 1, x.shape[0], u.shape
        return u.new_zeros(B, H, D), x.new_zeros(T, H, dtype=acc), u.new_zeros(B, H)
    with torch.autocast(x.device.type, enabled=False):
        return _backend(backend).fwd(x.contiguous(), u, cu_seqlens, max_seqlen)


@torch.library.impl("siglip2::map_pool_bwd", "CompositeExplicitAutograd")
def _(dm, x, u, m, s, lse, cu_seqlens, max_seqlen, backend):
    if x.shape[0] == 0 or cu_seqlens.shape[0] == 1:
        return torch.zeros_like(x), torch.zeros_like(u)
    with torch.autocast(x.device.type, enabled=False):
        args = (dm.contiguous(), x.contiguous(), u, m, s, lse)
        return _backend(backend).bwd(*args, cu_seqlens, max_seqlen)


@torch.library.register_fake("siglip2::map_pool")
def _(x, u, cu_seqlens, max_seqlen, backend):
    B, T, (H, D) = cu_seqlens.shape[0] - 1, x.shape[0], u.shape
    return u.new_empty(B, H, D), u.new_empty(T, H), u.new_empty(B, H)


@torch.library.register_fake("siglip2::map_pool_bwd")
def _(dm, x, u, m, s, lse, cu_seqlens, max_seqlen, backend):
    return x.new_empty(x.shape), torch.empty_like(u)


_fwd = torch.ops.siglip2.map_pool.default
_bwd = torch.ops.siglip2.map_pool_bwd.default


def _setup(ctx, inputs, output):
    x, u, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(x, u, *output, cu_seqlens)


def _grad(ctx, dm, ds, dlse):
    x, u, m, s, lse, cu_seqlens = ctx.saved_tensors
    dx, du = _bwd(dm, x, u, m, s, lse, cu_seqlens, *ctx.rest)
    return dx, du, None, None, None


torch.library.register_autograd("siglip2::map_pool", _grad, setup_context=_setup)


def _unsupported(x: Tensor, u: Tensor, cu_seqlens: Tensor) -> dict[str, str | None]:
    triton = no_triton(x)
    if triton is None:
        triton = _backend("triton").unsupported(x, u, cu_seqlens)
    chunked = _chunked.unsupported(x, u, cu_seqlens)
    cuda = "there is no CUDA C++ kernel of this op"
    return {"cuda": cuda, "triton": triton, "chunked": chunked, "reference": None}


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, u = torch.empty(256, 768, dtype=dtype, device=device), torch.empty(12, 768, device=device)
    return _unsupported(x, u, torch.tensor([0, 256], dtype=torch.int32, device=device))


def map_pool(
    x: Tensor,  # (T, D)
    cu_seqlens: Tensor,  # (B+1,) int32
    max_seqlen: int,
    probe: Tensor,  # (1, D)
    q_weight: Tensor,  # (D, D)
    q_bias: Tensor,  # (D,)
    kv_weight: Tensor,  # (2 * D, D): keys' rows, then values'
    kv_bias: Tensor,  # (2 * D,)
    *,
    num_heads: int,
    backend: Backend | None = None,
) -> Tensor:  # (B, D), x's dtype
    """What one learned probe reads from each packed sequence, heads joined, before `out`.

    Parameters have the released layout. Zeros for an empty sequence. Differentiable in x and all
    parameters (the keys' bias gets zeros: it cancels). Softmax and sums over tokens are float32.
    Deterministic.

    Raises:
        ValueError: A shape, dtype or device is wrong.
        NotImplementedError: The asked-for backend does not take this input.
    """
    parameters = (probe, q_weight, q_bias, kv_weight, kv_bias)
    check(x, cu_seqlens, parameters, num_heads)
    H, D = num_heads, x.shape[1]
    acc = torch.promote_types(x.dtype, torch.float32)
    u_like = x.new_empty(H, 0)
    name = choose(backend, _unsupported(x, u_like, cu_seqlens), x.device)
    if name == "reference":
        return reference.map_pool(x, cu_seqlens, *parameters, num_heads=H)
    probe, q_weight, q_bias, kv_weight, kv_bias = (w.to(acc) for w in parameters)
    k_weight, v_weight = kv_weight.view(2, H, D // H, D).unbind(0)  # (H, E, D)
    q = F.linear(probe, q_weight, q_bias).view(H, -1) / (D // H) ** 0.5
    u = torch.einsum("he,hed->hd", q, k_weight)
    m, _, _ = _fwd(x, u, cu_seqlens, max_seqlen, name)
    m, v_weight = m.to(x.dtype), v_weight.to(x.dtype)
    pooled = torch.einsum("bhd,hed->bhe", m, v_weight).flatten(1)
    is_empty = (cu_seqlens.diff() == 0)[:, None]
    return (pooled + kv_bias[D:].to(x.dtype)).masked_fill(is_empty, 0)
