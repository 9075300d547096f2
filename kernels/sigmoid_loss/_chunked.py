"""Eager backend with bounded memory: rows of the logit matrix come and go in chunks. Any device.

Loss and gradients are made in one pass. Totals and gradients are raw sums: the caller applies the
temperature, the weights' maxima and the reduction, so no half-precision value carries a 1 / B.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, product_dtype, unit_scale

# Elements of one chunk of logits; about four float32 buffers of this size live at a time. On the
# CPU a chunk should stay near the caches, on a GPU it should fill the matrix units.
MAX_ELEMENTS = {"cpu": 1 << 21}
MAX_ELEMENTS_DEVICE = 1 << 27
THRESHOLD = 40.0  # where softplus(x) == x in float64; the default of 20 is float32's


def unsupported(img: Tensor, txt: Tensor) -> str | None:
    return None


def _chunks(img: Tensor, txt: Tensor):
    limit = MAX_ELEMENTS.get(img.device.type, MAX_ELEMENTS_DEVICE)
    return row_chunks(img.shape[0], txt.shape[0], limit)


def _signed_logits(
    raw: Tensor,  # (c, M)
    scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (c,)
    txt_ids: Tensor | None,  # (M,)
    start: int,
) -> tuple[Tensor, Tensor | None]:  # (c, M), (c, M) bool
    """-y z: what softplus and sigmoid take; and which pairs are positive when ids say so."""
    s = (raw * scale).add_(bias)
    if img_ids is None:
        s.diagonal(start).neg_()
        return s, None
    is_pos = img_ids[:, None] == txt_ids
    return torch.where(is_pos, -s, s), is_pos


def _grad_of_logits(
    s: Tensor,  # (c, M), overwritten
    is_pos: Tensor | None,
    start: int,
    img_weight: Tensor | None,  # (c,)
    txt_weight: Tensor | None,  # (M,)
) -> Tensor:  # (c, M)
    """dl/dz = -y sigmoid(-y z), weighted; exact near 0 because no 1 is subtracted."""
    g = torch.sigmoid_(s)
    if is_pos is None:
        g.diagonal(start).neg_()
    else:
        g = torch.where(is_pos, -g, g)
    if img_weight is not None:
        g.mul_(img_weight[:, None])
    if txt_weight is not None:
        g.mul_(txt_weight)
    return g


def _weighted(
    losses: Tensor,  # (c, M), overwritten
    img_weight: Tensor | None,  # (c,)
    txt_weight: Tensor | None,  # (M,)
) -> Tensor:  # (c, M)
    if img_weight is not None:
        losses.mul_(img_weight[:, None])
    if txt_weight is not None:
        losses.mul_(txt_weight)
    return losses


def _rows(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if x is None else x[start:stop]


def fwd(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,)
    txt_weight: Tensor | None,  # (M,)
    needs_dimg: bool,
    needs_dtxt: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (3,), (B, D) or (0, D), (M, D) or (0, D)
    """Sums of loss, G * raw and G over all pairs, then G @ txt and G.T @ img."""
    acc = torch.promote_types(img.dtype, torch.float32)
    scale, bias = log_scale.to(acc).exp(), bias.to(acc)
    img, txt = img.to(product_dtype(img)), txt.to(product_dtype(txt))
    dimg = img.new_empty((img.shape[0] if needs_dimg else 0, img.shape[1]), dtype=acc)
    dtxt = txt.new_zeros((txt.shape[0] if needs_dtxt else 0, txt.shape[1]), dtype=acc)
    totals, lift = [], unit_scale(img.dtype)
    for start, stop in _chunks(img, txt):
        weights = _rows(img_weight, start, stop), txt_weight
        raw = mm_f32(img[start:stop], txt.T)
        s, is_pos = _signed_logits(raw, scale, bias, _rows(img_ids, start, stop), txt_ids, start)
        loss = _weighted(F.softplus(s, threshold=THRESHOLD), *weights).sum()
        g = _grad_of_logits(s, is_pos, start, *weights)
        totals.append(torch.stack((loss, raw.mul_(g).sum(), g.sum())))
        g = g.mul_(lift).to(img.dtype) if lift != 1 else g.to(img.dtype)
        if needs_dimg:
            mm_f32(g, txt, out=dimg[start:stop])
        if needs_dtxt:
            addmm_f32_(dtxt, g.T, img[start:stop])
    if lift != 1:
        dimg.mul_(1 / lift), dtxt.mul_(1 / lift)
    return torch.stack(totals).sum(0), dimg, dtxt


def sums(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,)
    txt_weight: Tensor | None,  # (M,)
) -> tuple[Tensor, Tensor]:  # (B,), (M,)
    """The weighted losses summed over each row and each column."""
    acc = torch.promote_types(img.dtype, torch.float32)
    scale, bias = log_scale.to(acc).exp(), bias.to(acc)
    img, txt = img.to(product_dtype(img)), txt.to(product_dtype(txt))
    rows = img.new_empty(img.shape[0], dtype=acc)
    columns = txt.new_zeros(txt.shape[0], dtype=acc)
    for start, stop in _chunks(img, txt):
        ids = _rows(img_ids, start, stop), txt_ids
        s, _ = _signed_logits(mm_f32(img[start:stop], txt.T), scale, bias, *ids, start)
        losses = _weighted(
            F.softplus(s, threshold=THRESHOLD), _rows(img_weight, start, stop), txt_weight
        )
        torch.sum(losses, 1, out=rows[start:stop])
        columns += losses.sum(0)
    return rows, columns
