"""Triton backend: exponentials from the epilogue of a product, then two library products.

Logits never reach memory. What does is E = exp(z - m) in the inputs' dtype, for one chunk of tokens
at a time, with m a number for each token, fixed beforehand from its target's logit. Softmax is then
E times a factor for each token, which the rows of x and of dx carry through the products.
"""

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._core.matmul import addmm_f32_, mm_f32
from .._core.tile_product import Tile, capability_of, has_tma, num_programs
from ._exp_tile import _exp_tile_kernel
from ._target import patch_of_target, target_logits
from .tokens import token_chunks

# Elements of E: 8,320 tokens of a vocabulary of 256,000, 4.3 GB in 16 bits.
MAX_ELEMENTS = 1 << 31
MIN_TOKENS = 1024
# m lies this far above the target's logit, in nats. Terms 79 below that logit are flushed to zero.
OFFSET = 8.0
# Of a token's sum of exp(z - m): far from the largest float32, also after products. A logit beyond
# it, 71 nats above the target's, makes its tile of tokens start over with their maxima as m.
LIMIT = 2.0**92
# float16 has no such range. There m is the log-sum-exp, known after a first product, and E this.
FLOAT16_LIFT = 2.0**14
LOG2_E = 1 / math.log(2)

# Hopper's is the fastest of 14 on an H100. The others are chosen by compile reports (registers,
# spills, shared memory); no GPU has timed them.
HOPPER = Tile(128, 256, 64, pieces=2, num_warps=8, num_stages=3, blocks=1, is_flat=True)
# Where the wide tile spills: with a bias, a cap or addresses of its own.
HOPPER_NARROW = Tile(128, 128, 64, pieces=8, num_warps=8, num_stages=3, blocks=2, is_flat=True)
BLACKWELL = Tile(128, 128, 64, pieces=8, num_warps=4, num_stages=3, blocks=2, is_flat=False)
AMPERE = Tile(128, 64, 64, pieces=4, num_warps=4, num_stages=3, blocks=3, is_flat=False)
# A multiprocessor of Ada and of consumer GPUs has 100 KB of shared memory.
CONSUMER = Tile(128, 64, 32, pieces=4, num_warps=4, num_stages=3, blocks=2, is_flat=True)
# Float32 products without TF32 run on the ordinary cores.
FLOAT32 = Tile(64, 64, 32, pieces=2, num_warps=4, num_stages=2, blocks=2, is_flat=True)
# A soft cap's registers cost a block, or they spill.
CAPPED = {
    HOPPER_NARROW: HOPPER_NARROW._replace(blocks=1),
    AMPERE: AMPERE._replace(blocks=2, is_flat=True),
}
# Tiles of tokens that go through the vocabulary together: so often is the weight read, and their
# rows of x, 4096 x 768 x 2 bytes, stay in L2.
GROUP = 32


def config(
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    has_bias: bool = False,
    has_softcap: bool = False,
    reads_by_tma: bool = True,
) -> Tile:
    if dtype is torch.float32:
        return FLOAT32
    is_light = reads_by_tma and not has_bias and not has_softcap
    if capability == (8, 0):
        tile = AMPERE
    else:
        hopper = HOPPER if is_light else HOPPER_NARROW
        tile = {9: hopper, 10: BLACKWELL}.get(capability[0], CONSUMER)
    return CAPPED.get(tile, tile) if has_softcap else tile


def unsupported(
    x: Tensor, weight: Tensor, label_smoothing: float, softcap: float | None
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {x.dtype}"
    if label_smoothing and softcap is not None:
        return "smooths labels of logits without a soft cap only"
    if x.stride(1) != 1 or weight.stride(1) != 1:
        return f"needs rows of unit stride, got strides {x.stride()}, {weight.stride()}"
    return None


class _Tiles:
    """Launches the kernel on chunks of at most `rows` tokens, with buffers made once."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        wants_maxes: bool,
    ):
        self.weight, self.softcap, self.wants_maxes = weight, softcap, wants_maxes
        self.bias = None if bias is None else bias.float()
        self.tma = has_tma(x.dtype, capability_of(x), x, weight)
        options = {"has_bias": bias is not None, "has_softcap": softcap is not None}
        self.tile = config(x.dtype, capability_of(x), **options, reads_by_tma=self.tma)
        self.num_v = triton.cdiv(weight.shape[0], self.tile.BV)
        self.is_lifted = x.dtype is torch.float16
        self.e = self.sums = self.maxes = None

    def allocate(self, x: Tensor, rows: int, keeps_e: bool) -> None:
        self.sums = x.new_empty(self.num_v * rows, dtype=torch.float32)
        self.maxes = torch.empty_like(self.sums) if self.wants_maxes else None
        if keeps_e:
            whole = triton.cdiv(rows, self.tile.BT) * self.tile.BT
            self.e = x.new_empty(whole, self.num_v * self.tile.BV)

    def _partial(self, buffer: Tensor, n: int) -> Tensor:  # (tiles of the vocabulary, n) float32
        return buffer[: self.num_v * n].view(self.num_v, n)

    def _whole_tiles(self, n: int) -> Tensor | None:  # (tokens, words) of all tiles
        return None if self.e is None else self.e[: triton.cdiv(n, self.tile.BT) * self.tile.BT]

    def launch(
        self,
        x: Tensor,  # (n, D)
        *,
        m: Tensor | None = None,  # (n,)
        target: Tensor | None = None,  # (n,), for sums and maxes, which leave it out
        flags: Tensor | None = None,  # (tiles of tokens + 1,) int32
        e: Tensor | None = None,
        sums: Tensor | None = None,  # (tiles of the vocabulary, n)
        maxes: Tensor | None = None,  # likewise
    ) -> None:
        (T, D), V, tile = x.shape, self.weight.shape[0], self.tile
        strides = x.stride(0), self.weight.stride(0), 0 if e is None else e.stride(0)
        weight, device = self.weight, x.device
        if self.tma:
            x = TensorDescriptor.from_tensor(x, [tile.BT, tile.BD])
            weight = TensorDescriptor.from_tensor(weight, [tile.BV, tile.BD])
            if e is not None:
                e = TensorDescriptor.from_tensor(e, [tile.BT, tile.BV // tile.pieces])
        tiles = triton.cdiv(T, tile.BT) * self.num_v
        _exp_tile_kernel[(min(tiles, num_programs(tile, device)),)](
            x,
            weight,
            self.bias,
            target,
            None if m is None else m * LOG2_E,
            flags,
            e,
            sums,
            maxes,
            T,
            V,
            *strides,
            1.0 if self.softcap is None else self.softcap,
            D=D,
            BT=tile.BT,
            BV=tile.BV,
            BD=tile.BD,
            PIECES=tile.pieces,
            GROUP=GROUP,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_TMA=self.tma,
            # Tiles that are left out stand in the way of one loop over tiles and depth.
            FLATTEN=tile.is_flat and flags is None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.maxnreg,
        )

    def exponentials(
        self, x: Tensor, z_target: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # (n,), (n,), (n,)
        """Each token's m, sum of exp(z - m) over all words but the target, and their largest logit.

        Leaves E where it is wanted and has the range. Tokens whose sums leave the safe range are
        counted on the device, and two more launches do their tiles again, or find that there are
        none; the host does not wait to know.
        """
        n, e = len(x), None if self.is_lifted else self._whole_tiles(len(x))
        m, sums = z_target + OFFSET, self._partial(self.sums, len(x))
        maxes = self._partial(self.maxes, n) if self.wants_maxes else None
        self.launch(x, m=m, target=target, e=e, sums=sums, maxes=maxes)
        total = sums.sum(0)
        is_off = ~(total <= LIMIT)  # NaN too
        flags = self._flags(is_off)
        if maxes is None:
            self.launch(x, target=target, flags=flags, maxes=sums)
        largest = (sums if maxes is None else maxes).amax(0)
        m = torch.where(is_off, torch.maximum(largest, z_target), m)
        self.launch(x, m=m, target=target, flags=flags, e=e, sums=sums)
        return m, torch.where(is_off, sums.sum(0), total), None if maxes is None else largest

    def softmax(
        self, x: Tensor, m: Tensor, lse: Tensor, bend: Tensor
    ) -> tuple[Tensor, Tensor]:  # (n, V), (n,)
        """E, and the factor of each row that makes it probabilities."""
        e = self._whole_tiles(len(x))
        if self.is_lifted:
            # The target's E is divided by `bend`, so it is to have room above it.
            m = lse - (FLOAT16_LIFT * bend.abs().clamp(max=1)).log()
            self.launch(x, m=m, e=e)
        return e[: len(x), : self.weight.shape[0]], (m - lse).exp()

    def _flags(self, is_off: Tensor) -> Tensor:  # (tiles + 1,) int32
        BT = self.tile.BT
        of_tiles = F.pad(is_off, (0, -len(is_off) % BT)).view(-1, BT).any(1).int()
        return torch.cat((of_tiles, of_tiles.sum(0, keepdim=True, dtype=torch.int32)))


def fwd(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,) int64 within [0, V)
    bias: Tensor | None,  # (V,)
    row_weight: Tensor,  # (T,) float32 within [-1, 1], 0 for ignored tokens
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
    T, V = x.shape[0], weight.shape[0]
    tiles = _Tiles(x, weight, bias, softcap, wants_accuracy)
    grads = _Gradients(x, weight, needs_dx, needs_dweight, needs_dbias)
    z_target = target_logits(x, weight, bias, target, softcap)
    against, lse = row_weight.new_empty(T), row_weight.new_empty(T)
    is_best = target.new_zeros(T if wants_accuracy else 0, dtype=torch.bool)
    limits = {"max_elements": MAX_ELEMENTS, "min_tokens": MIN_TOKENS}
    for start, stop in token_chunks(T, V, chunk_tokens, **limits):
        part = slice(start, stop)
        rows, z_y, y = x[part], z_target[part], target[part]
        if start == 0:
            tiles.allocate(x, len(rows), grads.any)
        m, total, largest = tiles.exponentials(rows, z_y, y)
        log_total = total.log_()
        # log((1 - p) / p) of the target: both p and 1 - p come from it without a cancellation.
        torch.add(log_total, m - z_y, out=against[part])
        torch.logaddexp(log_total.add_(m), z_y, out=lse[part])
        if wants_accuracy:
            torch.ge(z_y, largest, out=is_best[part])
        if grads.any:
            bend = _bend(lse[part], z_loss)
            e, scale = tiles.softmax(rows, m, lse[part], bend)
            hit = (1 - label_smoothing) / bend
            patch = patch_of_target(z_y, against[part], hit, scale, softcap)
            rounded = patch.to(e.dtype)
            e.scatter_(1, y[:, None], rounded[:, None])
            # The target's share is the largest: the row's factor makes up for its rounding.
            scale = scale * torch.where(rounded == 0, 1, patch / rounded)
            grads.add(e, rows, row_weight[part] * bend * scale, part)
    grads.unlift()
    losses = F.softplus(against) + z_loss * lse.square()
    if label_smoothing:
        losses += label_smoothing * z_target
        smoother = _Smoother(x, weight, bias, label_smoothing)
        losses -= smoother.mean_logits()
        smoother.subtract_from(grads, row_weight)
    return losses, lse, is_best, grads.dx, grads.dweight, grads.dbias


def _bend(lse: Tensor, z_loss: float) -> Tensor:
    """A token's dz is this times p, less what its target and smoothing take.

    The target's share is divided by it. Where it vanishes, 2^-24 of p is a rounding of float32.
    """
    bend = 1 + 2 * z_loss * lse
    return torch.where(bend.abs() < 2.0**-24, 2.0**-24, bend)


class _Gradients:
    """dx, dweight and dbias, float32, from E and each row's factor."""

    def __init__(self, x: Tensor, weight: Tensor, *needs: bool):
        self.weight = weight
        self.needs_dx, self.needs_dweight, self.needs_dbias = needs
        self.any = any(needs)
        # Keeps the rows of float16 x in range.
        self.lift = FLOAT16_LIFT if x.dtype is torch.float16 else 1.0
        (T, D), V = x.shape, weight.shape[0]
        options = {"dtype": torch.float32, "device": x.device}
        self.dx = torch.empty(T if self.needs_dx else 0, D, **options)
        self.dweight = torch.empty(V if self.needs_dweight else 0, D, **options)
        self.dbias = torch.zeros(V if self.needs_dbias else 0, **options)

    def add(self, e: Tensor, rows: Tensor, factor: Tensor, part: slice) -> None:
        """e (n, V), rows (n, D), factor (n,)."""
        if self.needs_dx:
            mm_f32(e, self.weight, out=self.dx[part]).mul_(factor[:, None])
        factor = factor[:, None]
        if self.needs_dweight:
            scaled = torch.mul(rows, self.lift * factor, out=torch.empty_like(rows))
            if part.start == 0:  # zeros to add to would be written, and read
                mm_f32(e.T, scaled, out=self.dweight)
            else:
                addmm_f32_(self.dweight, e.T, scaled)
        if self.needs_dbias:
            addmm_f32_(self.dbias[:, None], e.T, (self.lift * factor).to(e.dtype))

    def unlift(self) -> None:
        if self.lift != 1:
            self.dweight.mul_(1 / self.lift), self.dbias.mul_(1 / self.lift)


class _Smoother:
    """The share s / V of every word: of all words at once, so the products need not know of it."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, label_smoothing: float):
        self.x, self.share = x, label_smoothing / weight.shape[0]
        self.words = weight.sum(0, dtype=torch.float32)  # (D,)
        self.biases = 0.0 if bias is None else bias.float().sum()
        self.parts = [slice(i, i + 4096) for i in range(0, len(x), 4096)]

    def mean_logits(self) -> Tensor:  # (T,), times the smoothing
        z = torch.cat([torch.mv(self.x[part].float(), self.words) for part in self.parts])
        return (z + self.biases) * self.share

    def subtract_from(self, grads: _Gradients, row_weight: Tensor) -> None:
        if grads.needs_dx:
            grads.dx.addr_(row_weight, self.words, alpha=-self.share)
        if grads.needs_dweight:
            rows = sum(row_weight[part] @ self.x[part].float() for part in self.parts)  # (D,)
            grads.dweight.sub_(rows, alpha=self.share)
        if grads.needs_dbias:
            grads.dbias.sub_(row_weight.sum(), alpha=self.share)
