"""Eager backend with bounded memory: rows of the logit matrix come and go in chunks. Any device.

Loss and gradients are made in one pass. Totals and gradients are raw sums: the caller applies the
temperature, the weights' maxima and the reduction, so no half-precision value carries a 1 / B.
"""

import torch
from torch import Tensor

from .._core.chunks import row_chunks
from .._core.matmul import addmm_f32_, mm_f32, product_dtype, unit_scale

# Elements of one chunk of logits; three float32 buffers of this size live at a time. On the CPU a
# chunk should stay near the caches, on a GPU it should fill the matrix units.
MAX_ELEMENTS = {"cpu": 1 << 21}
MAX_ELEMENTS_DEVICE = 1 << 27
THRESHOLD = 40.0  # where softplus(x) == x in float64; the default of 20 is float32's


def unsupported(img: Tensor, txt: Tensor) -> str | None:
    return None


def _chunks(img: Tensor, txt: Tensor):
    limit = MAX_ELEMENTS.get(img.device.type, MAX_ELEMENTS_DEVICE)
    return row_chunks(img.shape[0], txt.shape[0], limit)


class _Buffers:
    """What one chunk needs, made once: blocks that come and go leave holes in the CPU's heap."""

    def __init__(
        self, img: Tensor, txt: Tensor, acc: torch.dtype, pairs: tuple[Tensor | None, ...]
    ):
        img_ids, _, img_ignore_ids, *_ = pairs
        self.chunks = list(_chunks(img, txt))
        shape = max((stop - start for start, stop in self.chunks), default=0), txt.shape[0]
        self.raw, self.s, self.spare = (img.new_empty(shape, dtype=acc) for _ in range(3))
        self.is_pos = None if img_ids is None else img.new_empty(shape, dtype=torch.bool)
        ignores = img_ignore_ids is not None
        self.is_ignored = img.new_empty(shape, dtype=torch.bool) if ignores else None

    def rows(self, count: int) -> list[Tensor | None]:
        named = self.raw, self.s, self.spare, self.is_pos, self.is_ignored
        return [None if x is None else x[:count] for x in named]


class _Chunk:
    """Rows [start, stop) of the pairs: their logits, losses and G, in a chunk's buffers."""

    def __init__(self, buffers: _Buffers, start: int, stop: int, pairs: tuple[Tensor | None, ...]):
        self.start, self.stop = start, stop
        self.raw, self.s, self.spare, self.is_pos, self.is_ignored = buffers.rows(stop - start)
        # Every other one belongs to the captions, of which all are here.
        self.pairs = [
            x[start:stop] if x is not None and i % 2 == 0 else x for i, x in enumerate(pairs)
        ]

    def make_logits(self, img: Tensor, txt: Tensor, scale: Tensor, bias: Tensor) -> None:
        """raw, and s = -y z, what softplus and sigmoid take; -inf, where both are 0, if ignored."""
        mm_f32(img[self.start : self.stop], txt.T, out=self.raw)
        torch.mul(self.raw, scale, out=self.s).add_(bias)
        img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, *_ = self.pairs
        if img_ids is not None:
            torch.eq(img_ids[:, None], txt_ids, out=self.is_pos)
        self._negate_positives()
        if img_ignore_ids is None:
            return
        torch.eq(img_ignore_ids[:, None], txt_ignore_ids, out=self.is_ignored)
        if img_ids is None:
            self.is_ignored.diagonal(self.start).fill_(False)
        else:
            # a > b is "a and not b" of booleans.
            torch.gt(self.is_ignored, self.is_pos, out=self.is_ignored)
        self.s.masked_fill_(self.is_ignored, -torch.inf)

    def losses(self) -> Tensor:  # (c, M)
        return self._weigh(torch.ops.aten.softplus.out(self.s, 1, THRESHOLD, out=self.spare))

    def grad_of_logits(self) -> Tensor:  # (c, M)
        """G = dl/dz = -y sigmoid(-y z), weighted; exact near 0 because no 1 is subtracted."""
        torch.sigmoid_(self.s)
        self._negate_positives()
        return self._weigh(self.s)

    def _negate_positives(self) -> None:
        if self.is_pos is None:
            self.s.diagonal(self.start).neg_()
        else:
            torch.where(self.is_pos, torch.neg(self.s, out=self.spare), self.s, out=self.s)

    def _weigh(self, x: Tensor) -> Tensor:  # (c, M), changed
        *_, img_weight, txt_weight = self.pairs
        if img_weight is not None:
            x.mul_(img_weight[:, None])
        if txt_weight is not None:
            x.mul_(txt_weight)
        return x


def _prepared(
    img: Tensor, txt: Tensor, log_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = torch.promote_types(img.dtype, torch.float32)
    scale, bias = log_scale.to(acc).exp(), bias.to(acc)
    return img.to(product_dtype(img)), txt.to(product_dtype(txt)), scale, bias


def fwd(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_ignore_ids: Tensor | None,  # (B,)
    txt_ignore_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,)
    txt_weight: Tensor | None,  # (M,)
    needs_dimg: bool,
    needs_dtxt: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (3,), (B, D) or (0, D), (M, D) or (0, D)
    """Sums of loss, G * raw and G over all pairs, then G @ txt and G.T @ img."""
    img, txt, scale, bias = _prepared(img, txt, log_scale, bias)
    pairs = img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight
    dimg = scale.new_empty(img.shape[0] if needs_dimg else 0, img.shape[1])
    dtxt = scale.new_zeros(txt.shape[0] if needs_dtxt else 0, txt.shape[1])
    buffers, lift = _Buffers(img, txt, scale.dtype, pairs), unit_scale(img.dtype)
    totals = scale.new_empty(len(buffers.chunks), 3)
    for total, (start, stop) in zip(totals, buffers.chunks, strict=True):
        chunk = _Chunk(buffers, start, stop, pairs)
        chunk.make_logits(img, txt, scale, bias)
        torch.sum(chunk.losses(), (0, 1), out=total[0])
        g = chunk.grad_of_logits()
        torch.sum(chunk.raw.mul_(g), (0, 1), out=total[1])
        torch.sum(g, (0, 1), out=total[2])
        if needs_dimg or needs_dtxt:
            g = g.mul_(lift).to(img.dtype) if lift != 1 else g.to(img.dtype)
        if needs_dimg:
            mm_f32(g, txt, out=dimg[start:stop])
        if needs_dtxt:
            addmm_f32_(dtxt, g.T, img[start:stop])
    if lift != 1:
        dimg.mul_(1 / lift), dtxt.mul_(1 / lift)
    return totals.sum(0), dimg, dtxt


def sums(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (M, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    img_ids: Tensor | None,  # (B,)
    txt_ids: Tensor | None,  # (M,)
    img_ignore_ids: Tensor | None,  # (B,)
    txt_ignore_ids: Tensor | None,  # (M,)
    img_weight: Tensor | None,  # (B,)
    txt_weight: Tensor | None,  # (M,)
) -> tuple[Tensor, Tensor]:  # (B,), (M,)
    """The weighted losses summed over each row and each column."""
    img, txt, scale, bias = _prepared(img, txt, log_scale, bias)
    pairs = img_ids, txt_ids, img_ignore_ids, txt_ignore_ids, img_weight, txt_weight
    rows, columns = scale.new_empty(img.shape[0]), scale.new_zeros(txt.shape[0])
    buffers = _Buffers(img, txt, scale.dtype, pairs)
    for start, stop in buffers.chunks:
        chunk = _Chunk(buffers, start, stop, pairs)
        chunk.make_logits(img, txt, scale, bias)
        losses = chunk.losses()
        torch.sum(losses, 1, out=rows[start:stop])
        columns += losses.sum(0)
    return rows, columns
