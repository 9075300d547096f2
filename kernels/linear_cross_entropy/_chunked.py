"""Eager backend with bounded memory: the logits of a chunk of tokens come and go. Any device.

Loss and gradients are made in one pass over float32 logits (float64 for float64 inputs). Gradients
are raw sums over tokens: the caller applies the reduction.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._core.matmul import addmm_f32_, mm_f32, product_dtype, unit_scale
from .tokens import token_chunks

# Logits of a chunk, float32. Longer chunks mean fewer passes over the float32 dweight.
MAX_ELEMENTS = {"cpu": 1 << 26}
MAX_ELEMENTS_DEVICE = 1 << 28
MIN_TOKENS = {"cpu": 128}
MIN_TOKENS_DEVICE = 1024
# Rows of a weight that is converted for a product: the converted copy is this large at most.
BLOCK = 1 << 15


def unsupported(
    x: Tensor, weight: Tensor, label_smoothing: float, softcap: float | None
) -> str | None:
    return None


class _Weight:
    """The (V, D) weight in the dtype of x, then of the products, converted block by block."""

    def __init__(self, weight: Tensor, x: Tensor):
        self.weight, self.x_dtype, self.dtype = weight, x.dtype, product_dtype(x)
        converts = not weight.dtype == self.x_dtype == self.dtype
        self.step = BLOCK if converts else max(weight.shape[0], 1)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.weight.shape[0], self.step):
            part = slice(start, start + self.step)
            yield part, self.weight[part].to(self.x_dtype).to(self.dtype)


class _Logits:
    """Logits of a chunk of tokens and what follows from them, in buffers made once."""

    def __init__(self, weight: _Weight, bias: Tensor | None, softcap: float | None, acc):
        self.weight, self.softcap = weight, softcap
        self.bias = None if bias is None else bias.to(acc)
        self.acc = acc
        self.buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, rows: int) -> Tensor:
        if name not in self.buffers:  # the first chunk is the longest
            source = self.weight.weight
            self.buffers[name] = source.new_empty((rows, source.shape[0]), dtype=self.acc)
        return self.buffers[name][:rows]

    def make(self, x: Tensor, needs_slope: bool) -> tuple[Tensor, Tensor | None]:  # (c, V), (c, V)
        """Logits, and their derivatives by the raw ones where a cap bends them."""
        z = self._buffer("z", x.shape[0])
        for part, w in self.weight.blocks():
            mm_f32(x, w.T, out=z[:, part])
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is None:
            return z, None
        z.div_(self.softcap).tanh_()
        slope = None
        if needs_slope:
            slope = torch.mul(z, z, out=self._buffer("slope", len(z))).neg_().add_(1)
        return z.mul_(self.softcap), slope


def _chunks(x: Tensor, V: int, chunk_tokens: int | None) -> Iterator[tuple[int, int]]:
    kind = x.device.type
    return token_chunks(
        *(x.shape[0], V, chunk_tokens),
        max_elements=MAX_ELEMENTS.get(kind, MAX_ELEMENTS_DEVICE),
        min_tokens=MIN_TOKENS.get(kind, MIN_TOKENS_DEVICE),
    )


def fwd(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,) int64 within [0, V)
    bias: Tensor | None,  # (V,)
    row_weight: Tensor,  # (T,) float32 or float64 within [-1, 1], 0 for ignored tokens
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_tokens: int | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    wants_accuracy: bool,
) -> tuple[Tensor, ...]:
    """(T,) losses, (T,) lse, (T,) bool; gradients of the weighted sum of losses, or empty."""
    (T, D), V = x.shape, weight.shape[0]
    losses, lse = row_weight.new_empty(T), row_weight.new_empty(T)
    is_best = target.new_zeros(T if wants_accuracy else 0, dtype=torch.bool)
    dx = row_weight.new_zeros(T if needs_dx else 0, D)
    dweight = row_weight.new_zeros(V if needs_dweight else 0, D)
    dbias = row_weight.new_zeros(V if needs_dbias else 0)
    weight = _Weight(weight, x)
    logits, lift = _Logits(weight, bias, softcap, row_weight.dtype), unit_scale(weight.dtype)
    needs_grad = needs_dx or needs_dweight or needs_dbias
    for start, stop in _chunks(x, V, chunk_tokens):
        part, y = slice(start, stop), target[start:stop, None]
        rows = x[part].to(weight.dtype)
        z, slope = logits.make(rows, needs_grad)
        z_y, top = z.gather(1, y), z.amax(1, keepdim=True)
        if wants_accuracy:
            torch.ge(z_y[:, 0], top[:, 0], out=is_best[part])
        loss = z_y * (label_smoothing - 1)
        if label_smoothing:
            loss.sub_(z.mean(1, keepdim=True), alpha=label_smoothing)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        row_lse = total.log().add_(top)
        loss.add_(row_lse).addcmul_(row_lse, row_lse, value=z_loss)
        losses[part], lse[part] = loss[:, 0], row_lse[:, 0]
        if not needs_grad:
            continue
        w = row_weight[part, None]
        g = _grad_of_logits(z, y, total, row_lse, w, slope, label_smoothing, z_loss)
        if needs_dbias:
            dbias += g.sum(0)
        g = (g if lift == 1 else g.mul_(lift)).to(weight.dtype)
        for words, block in weight.blocks() if needs_dx or needs_dweight else ():
            if needs_dx:
                addmm_f32_(dx[part], g[:, words], block)
            if needs_dweight:
                addmm_f32_(dweight[words], g[:, words].T, rows)
    if lift != 1:
        dx.mul_(1 / lift), dweight.mul_(1 / lift)
    return losses, lse, is_best, dx, dweight, dbias


def _grad_of_logits(
    e: Tensor,  # (c, V) exp(z - max z), changed
    y: Tensor,  # (c, 1)
    total: Tensor,  # (c, 1) its row sums
    lse: Tensor,  # (c, 1)
    w: Tensor,  # (c, 1)
    slope: Tensor | None,  # (c, V)
    label_smoothing: float,
    z_loss: float,
) -> Tensor:  # (c, V)
    """w (p (1 + 2 z_loss lse) - (1 - s) [v = y] - s / V), times the cap's slope."""
    e.mul_(w * (1 + 2 * z_loss * lse) / total)
    e.scatter_(1, y, e.gather(1, y) - (1 - label_smoothing) * w)
    if label_smoothing:
        e.sub_(w * (label_smoothing / e.shape[1]))
    return e if slope is None else e.mul_(slope)
