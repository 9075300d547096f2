"""What the linear cross entropy accepts, and how its tokens are weighted."""

from typing import NamedTuple

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


class Options(NamedTuple):
    """Numbers that shape a token's loss, and the most tokens of a chunk."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk_tokens: int | None


class Weights(NamedTuple):
    """What each token counts, and what the sum over them is divided by."""

    target: Tensor  # (T,) int64 within [0, V): 0 where ignored
    counts: Tensor  # (T,) bool: not ignored
    rows: Tensor  # (T,) float32 or float64 over their largest, 0 where ignored
    most: Tensor  # (), the largest
    factor: Tensor  # (), of the sum of `rows` times losses


def weigh(
    x: Tensor, target: Tensor, token_weight: Tensor | None, ignore_index: int, reduction: str
) -> Weights:
    """Weights within [-1, 1]: gradients of logits then stay in float16's range."""
    acc = torch.promote_types(x.dtype, torch.float32)
    counts = target != ignore_index
    rows = counts.to(acc)
    most = torch.ones((), dtype=acc, device=x.device)
    if token_weight is not None and len(target):
        rows = torch.where(counts, token_weight.to(acc), 0)
        most = rows.abs().amax()
        rows = rows / torch.where(most > 0, most, 1)
    factor = most
    if reduction == "mean":
        total = rows.sum()
        factor = torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))
    return Weights(torch.where(counts, target, 0).long(), counts, rows, most, factor)


def check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    valid_index: Tensor | None,
    weight_grad_out: Tensor | None,
) -> None:
    """Raises ValueError."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        got = f"{tuple(x.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"need x (T, D), weight (V, D); got {got}")
    if weight.shape[0] == 0:
        raise ValueError("need a weight of at least one word; got V=0")
    _check_dtypes(x, weight)
    T, V = x.shape[0], weight.shape[0]
    if target.shape != (T,) or target.dtype not in _INTEGERS:
        got = f"{tuple(target.shape)} {target.dtype}"
        raise ValueError(f"need target ({T},) of int32 or int64; got {got}")
    _check_vector("bias", bias, V)
    _check_vector("token_weight", token_weight, T)
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError(
            "token_weight gets no gradient, but it requires one; pass token_weight.detach()"
        )
    if valid_index is not None and (valid_index.ndim != 1 or valid_index.dtype not in _INTEGERS):
        got = f"{tuple(valid_index.shape)} {valid_index.dtype}"
        raise ValueError(f"need valid_index (n,) of int32 or int64, each token once; got {got}")
    _check_buffer(x, weight, weight_grad_out)
    named = {"weight": weight, "target": target, "bias": bias, "token_weight": token_weight}
    named |= {"valid_index": valid_index, "weight_grad_out": weight_grad_out}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"need all tensors on x's device, {x.device}; {name} is on {tensor.device}"
            )


def _check_dtypes(x: Tensor, weight: Tensor) -> None:
    is_rounded = weight.dtype is torch.float32 and x.dtype.itemsize == 2
    if not x.dtype.is_floating_point or not (weight.dtype == x.dtype or is_rounded):
        raise ValueError(
            "need x and weight of one floating-point dtype, or a float32 weight for 16-bit x;"
            f" got {x.dtype}, {weight.dtype}"
        )


def _check_vector(name: str, vector: Tensor | None, n: int) -> None:
    if vector is not None and (vector.shape != (n,) or not vector.dtype.is_floating_point):
        got = f"{tuple(vector.shape)} {vector.dtype}"
        raise ValueError(f"need {name} ({n},) of a floating-point dtype; got {got}")


def _check_buffer(x: Tensor, weight: Tensor, buffer: Tensor | None) -> None:
    acc = torch.promote_types(x.dtype, torch.float32)
    if buffer is None:
        return
    if buffer.shape != weight.shape or buffer.dtype != acc:
        got = f"{tuple(buffer.shape)} {buffer.dtype}"
        raise ValueError(f"need weight_grad_out {tuple(weight.shape)} of {acc}; got {got}")
    if buffer.requires_grad:
        raise ValueError("need weight_grad_out without a gradient of its own; got one that has")


def check_options(options: Options, reduction: str) -> None:
    """Raises ValueError."""
    smoothing, z_loss, softcap, chunk_tokens = options
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"need reduction 'mean', 'sum' or 'none'; got {reduction!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"need label_smoothing within [0, 1]; got {smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"need z_loss >= 0; got {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"need softcap > 0, or None for no cap; got {softcap}")
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ValueError(f"need chunk_tokens >= 1, or None for the default; got {chunk_tokens}")
