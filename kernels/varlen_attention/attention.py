"""The public forms of attention in a pack: q, k, v apart, one qkv tensor, and padded batches."""

from torch import Tensor

from .inputs import check, layout_of, padded_layout
from .op import Backend, attend
from .plan import VarlenPlan


def varlen_attention(
    q: Tensor,  # (T, H, E)
    k: Tensor,  # (S, H, E)
    v: Tensor,  # (S, H, E)
    cu_seqlens: Tensor,  # (B+1,) int32
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,  # (B+1,) int32
    max_seqlen_k: int | None = None,
    causal: bool = False,
    lookahead: Tensor | None = None,  # (B,) int32
    scale: float | None = None,
    plan: VarlenPlan | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (T, H, E), or with (H, T) float32
    """What each token reads from its own sequence; 0 where there is no key, or no sequence.

    Args:
        q, k, v: May be slices of one (T, 3, H, E) tensor; `varlen_qkv_attention` then saves the
            copy that joins their gradients.
        max_seqlen: At least the longest sequence; longer ones are wrong, not an error.
        cu_seqlens_k: Of keys and values, for cross-attention; None: that of the queries.
        causal: Token i of a sequence reads its tokens j <= i.
        lookahead: With `causal`, token i reads tokens j <= i + lookahead of its sequence: 0 is
            causal, the sequence's length both ways. So one call holds sequences of both kinds.
        scale: Of the scores; None means E ** -0.5.
        plan: From `make_plan`, with which no program starts in vain, long sequences go first, and
            sequences of one length may go to cuDNN.
        return_lse: Also the log-sum-exp of each query's scores, natural log, without gradient.

    Differentiable in q, k, v. Accumulates in float32. Deterministic, but for the gradients of
    "varlen_attn", which follow `torch.use_deterministic_algorithms`, and those of "cudnn".

    Raises:
        ValueError: A shape, dtype or device is wrong, or the plan is of other sequences.
        NotImplementedError: The asked-for backend does not take this input.
    """
    check(q, k, v)
    _check_lookahead(causal, lookahead)
    layout = layout_of(q, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, plan, lookahead)
    out, lse = attend((q, k, v), layout, causal, scale, backend)
    return (out, lse) if return_lse else out


def varlen_qkv_attention(
    qkv: Tensor,  # (T, 3, H, E)
    cu_seqlens: Tensor,  # (B+1,) int32
    max_seqlen: int,
    *,
    causal: bool = False,
    lookahead: Tensor | None = None,  # (B,) int32
    scale: float | None = None,
    plan: VarlenPlan | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (T, H, E)
    """`varlen_attention` of qkv's three slices, with the gradient written as one tensor."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"need qkv (T, 3, H, E); got {tuple(qkv.shape)}")
    _check_lookahead(causal, lookahead)
    layout = layout_of(qkv, cu_seqlens, max_seqlen, None, None, plan, lookahead)
    return attend((qkv,), layout, causal, scale, backend)[0]


def _check_lookahead(causal: bool, lookahead: Tensor | None) -> None:
    if lookahead is not None and not causal:
        raise ValueError("need causal=True with lookahead; got causal=False")


def padded_attention(
    q: Tensor,  # (B, N, H, E)
    k: Tensor,  # (B, M, H, E)
    v: Tensor,  # (B, M, H, E)
    lengths: Tensor,  # (B,) int32
    *,
    lengths_k: Tensor | None = None,  # (B,) int32
    causal: bool = False,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (B, N, H, E)
    """`varlen_attention` for callers with padding: rows from a length on are 0 with gradient 0."""
    layout = padded_layout(q, k, v, lengths, lengths_k)
    out, _ = attend([x.flatten(0, 1) for x in (q, k, v)], layout, causal, scale, backend)
    return out.view(q.shape)
