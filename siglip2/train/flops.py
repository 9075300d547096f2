"""FLOPs of the operations of a step: torch's own formulas, and those of our operations."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import flop_registry

import siglip2_kernels  # noqa: F401  registers the operations

_ours = torch.ops.siglip2


def _attention_flops(products: int) -> Callable[..., int]:
    """2 T N H E for each product: as if all sequences were as long as the longest may be."""

    def count(qkv, *args, out_val, **_) -> int:
        q, k = qkv[0], qkv[-1]
        *_, max_seqlen_k, _causal, _scale, _backend = args
        return 2 * products * q.shape[0] * max_seqlen_k * k.shape[-2] * k.shape[-1]

    return count


def _map_pool_flops(products: int) -> Callable[..., int]:
    """2 T H D for each product."""
    return lambda x, u, *_, out_val, **__: 2 * products * x.shape[0] * u.numel()


def _patch_embed_flops(patches, weight, *_, out_val, **__) -> int:
    return 2 * patches.shape[0] * weight.numel()


def _patch_embed_bwd_flops(dout, patches, weight, mask, *needs, out_val, **_) -> int:
    return 2 * sum(needs) * patches.shape[0] * weight.numel()


def _sigmoid_loss_flops(img, txt, *args, out_val, **_) -> int:
    """2 B M D for the logits and as much for each gradient."""
    needs_dimg, needs_dtxt, _backend = args[-3:]
    return 2 * (1 + needs_dimg + needs_dtxt) * img.shape[0] * txt.shape[0] * img.shape[1]


def _linear_cross_entropy_flops(x, weight, *args, out_val, **_) -> int:
    """2 T V D for the logits and as much for each gradient but the bias's."""
    needs_dx, needs_dweight, _needs_dbias, _wants_accuracy, _backend = args[-5:]
    return 2 * (1 + needs_dx + needs_dweight) * x.shape[0] * weight.numel()


def _prototype_cross_entropy_flops(student, weight, teacher, *args, out_val, **_) -> int:
    """2 (T + S) K D for both sides' logits and 2 T K D for each gradient."""
    needs_dstudent, needs_dweight, _backend = args[-3:]
    rows = student.shape[0] * (1 + needs_dstudent + needs_dweight) + teacher.shape[0]
    return 2 * rows * weight.numel()


def _prototype_lse_flops(rows, columns, *_, out_val, **__) -> int:
    return 2 * rows.shape[0] * columns.numel()


FLOPS = {
    **flop_registry,
    _ours.linear_cross_entropy: _linear_cross_entropy_flops,
    _ours.prototype_cross_entropy: _prototype_cross_entropy_flops,
    _ours.prototype_lse: _prototype_lse_flops,
    _ours.sigmoid_loss: _sigmoid_loss_flops,
    _ours.varlen_attention: lambda *args, **options: _attention_flops(2)(
        *args[:-1],  # without the backward's backend
        **options,
    ),
    _ours.varlen_attention_bwd: lambda dout, *args, **options: _attention_flops(5)(
        *args, **options
    ),
    _ours.map_pool: _map_pool_flops(2),
    _ours.map_pool_bwd: lambda dm, *args, **options: _map_pool_flops(4)(*args, **options),
    _ours.patch_embed: _patch_embed_flops,
    _ours.patch_embed_bwd: _patch_embed_bwd_flops,
}
