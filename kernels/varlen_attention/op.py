"""Softmax attention inside packed sequences: no padding, no mask, any mix of lengths.

    P_i = softmax(Q_i K_i^T scale),    O_i = P_i V_i,    lse = log sum_j exp(scale q . k_j)
    dV = P^T dO,    dP = dO V^T,    dS = P (dP - rowsum(dO O))
    dQ = scale dS K,    dK = scale dS^T Q

4 E sum n^2 FLOPs a head forward, 10 E sum n^2 backward. The scores exist in tiles only: memory is
linear in the tokens. Q, K, V and O are read once and dQ, dK, dV written once where a sequence fits
the L2 cache, which short sequences do: below about 300 tokens that traffic is the whole cost.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._core.backend import choose, no_triton
from . import _chunked, _cudnn, _flash, dispatch, reference
from .inputs import check, layout_of
from .plan import Layout, uniform_plan

Backend = Literal["reference", "chunked", "triton", "varlen_attn", "cudnn"]

_LAYOUT = (
    "Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor? used, Tensor? used_k, Tensor? lookahead, "
    "Tensor tiles, Tensor order, SymInt max_seqlen, SymInt max_seqlen_k, bool causal, float scale, "
    "str backend"
)
# qkv: three tensors, or one (T, 3, H, E), whose gradient is then one tensor too.
torch.library.define(
    "siglip2::varlen_attention",
    # `backward` makes the gradients: the backends write and read one log-sum-exp.
    f"(Tensor[] qkv, {_LAYOUT}, str backward) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "siglip2::varlen_attention_bwd",
    f"(Tensor dout, Tensor[] qkv, Tensor out, Tensor lse, {_LAYOUT}) -> Tensor[]",
)


def _backend(name: str):
    if name == "triton":
        from . import _triton

        return _triton
    return {"chunked": _chunked, "varlen_attn": _flash, "cudnn": _cudnn}[name]


def _split(qkv: Sequence[Tensor]) -> Sequence[Tensor]:  # (T, H, E), (S, H, E), (S, H, E)
    return qkv[0].unbind(1) if len(qkv) == 1 else qkv


def _empty_outputs(qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    q = _split(qkv)[0]
    (T, H, E), acc = q.shape, torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(T, H, E), q.new_empty(H, T, dtype=acc)


@torch.library.impl("siglip2::varlen_attention", "CompositeExplicitAutograd")
def _(qkv, *rest):
    *layout, causal, scale, backend, _ = rest
    q, k, v = _split(qkv)
    if q.numel() == 0 or k.numel() == 0 or layout[0].shape[0] == 1:
        out, lse = _empty_outputs(qkv)
        return out.zero_(), lse.fill_(-torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        return _backend(backend).fwd((q, k, v), Layout(*layout), causal, scale)


@torch.library.impl("siglip2::varlen_attention_bwd", "CompositeExplicitAutograd")
def _(dout, qkv, out, lse, *rest):
    *layout, causal, scale, backend = rest
    q, k, v = _split(qkv)
    grads = [x.new_empty(x.shape) for x in qkv]
    if q.numel() == 0 or k.numel() == 0 or layout[0].shape[0] == 1:
        return [grad.zero_() for grad in grads]
    with torch.autocast(q.device.type, enabled=False):
        args = (dout.contiguous(), (q, k, v), out, lse, _split(grads))
        _backend(backend).bwd(*args, Layout(*layout), causal, scale)
    return grads


@torch.library.register_fake("siglip2::varlen_attention")
def _(qkv, *rest):
    return _empty_outputs(qkv)


@torch.library.register_fake("siglip2::varlen_attention_bwd")
def _(dout, qkv, out, lse, *rest):
    return [x.new_empty(x.shape) for x in qkv]


_fwd = torch.ops.siglip2.varlen_attention.default
_bwd = torch.ops.siglip2.varlen_attention_bwd.default


def _setup(ctx, inputs, output):
    qkv, *layout = inputs[:8]
    ctx.rest = (*inputs[8:-2], inputs[-1])  # with the backward's backend
    ctx.save_for_backward(*output, *layout, *qkv)


def _grad(ctx, dout, dlse):
    saved = ctx.saved_tensors  # looked at once: a checkpoint unpacks them no second time
    out, lse, *layout = saved[:9]
    grads = _bwd(dout, list(saved[9:]), out, lse, *layout, *ctx.rest)
    return grads, *([None] * 13)


torch.library.register_autograd("siglip2::varlen_attention", _grad, setup_context=_setup)


def _unsupported(q: Tensor, layout: Layout, causal: bool) -> dict[str, str | None]:
    triton = no_triton(q)
    if triton is None:
        triton = _backend("triton").unsupported(q, layout, causal)
    reasons = {
        "triton": triton,
        "varlen_attn": _flash.unsupported(q, layout, causal),
        "cudnn": _cudnn.unsupported(q, layout, causal),
    }
    first = dispatch.preferred(q, layout).forward
    return (
        {first: reasons.pop(first)}
        | reasons
        | {
            "chunked": _chunked.unsupported(q, layout, causal),
            "reference": None,
        }
    )


def _backward_of(name: str, q: Tensor, layout: Layout, reasons: dict[str, str | None]) -> str:
    """The backward's backend where none was asked for and `name` makes the forward."""
    if name in ("chunked", "reference"):
        return name
    for other in (dispatch.preferred(q, layout).backward, "triton", "varlen_attn"):
        if reasons[other] is None:
            return other
    return name


def probe(device: torch.device) -> dict[str, str | None]:
    """Each backend's reason for not taking a training batch on `device`; None: it does."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.empty(256, 12, 64, dtype=dtype, device=device)
    cu = torch.tensor([0, 256], dtype=torch.int32, device=device)
    plan = uniform_plan(1, 256, device)
    return _unsupported(q, layout_of(q, cu, 256, None, None, plan), False)


def attend(
    qkv: Sequence[Tensor],
    layout: Layout,
    causal: bool,
    scale: float | None,
    backend: Backend | None,
) -> tuple[Tensor, Tensor]:  # (T, H, E), (H, T)
    """Output and log-sum-exp of three tensors or one, by the backend chosen."""
    q, k, v = _split(qkv)
    check(q, k, v)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"need scale > 0; got {scale}")
    reasons = _unsupported(q, layout, causal)
    name = choose(backend, reasons, q.device)
    if name == "reference":
        out, lse = reference.varlen_attention(q, k, v, *layout[:5], causal=causal, scale=scale)
    else:
        backward = backend or _backward_of(name, q, layout, reasons)
        out, lse = _fwd(list(qkv), *layout[:9], causal, scale, name, backward)
    return out, lse.detach()
