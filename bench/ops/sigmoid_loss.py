"""One device's share of the SigLIP loss: B images against their B captions, width D."""

import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import sigmoid_loss
from siglip2_kernels.sigmoid_loss.reference import sigmoid_loss as reference

from ..case import APPROXIMATE, Case, Cost, Mode, Rival

CHUNK_ROWS = 4096  # of open_clip's chunked loss; siglip-kernel picks the same on Hopper
SMALL_CHUNK_ROWS = 1024  # siglip-kernel's choice for least memory
TARGET = {"B": 65_536, "D": 768}  # what the project promises; siglip-kernel publishes it
SIZES = [1 << n for n in range(12, 19)]
WIDTHS = (768, 1152, 1536)  # of the released embeddings
# scale and bias at initialisation, and near where released checkpoints ended
INITIAL, TRAINED = {"scale": 10.0, "bias": -10.0}, {"scale": 117.0, "bias": -16.5}


def make(
    *,
    B: int,
    D: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    scale: float = INITIAL["scale"],
    bias: float = INITIAL["bias"],
) -> list[Tensor]:  # (B, D), (B, D), (), ()
    """Unit embeddings, positives closer than chance, log of the scale, bias."""
    draw = partial(torch.randn, B, D, device=device, generator=generator)
    img = F.normalize(draw(), dim=-1)
    txt = F.normalize(0.3 * img + F.normalize(draw(), dim=-1), dim=-1)
    scalars = [torch.tensor(v, device=device) for v in (math.log(scale), bias)]
    return [t.requires_grad_() for t in (img.to(dtype), txt.to(dtype), *scalars)]


def eager(
    img: Tensor,  # (B, D)
    txt: Tensor,  # (B, D)
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
) -> Tensor:  # ()
    """The formula as one writes it by hand: the product in the inputs' dtype, the rest in float32.

    Not the specification, whose float32 product leaves the tensor cores of a GPU unused: beating
    that would say nothing.
    """
    z = ((log_scale.exp() * img) @ txt.T).float() + bias  # (B, B)
    # softplus(-z) = softplus(z) - z at the positives: no (B, B) matrix of labels, the lean form.
    return (F.softplus(z).sum() - z.diagonal().sum()) / z.shape[0]


def siglip_kernel() -> Callable[..., Tensor]:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss


def siglip_kernel_small_chunks() -> Callable[..., Tensor]:
    from siglip_kernel import fused_chunked_bf16_siglip_loss

    return partial(fused_chunked_bf16_siglip_loss, chunk_size=SMALL_CHUNK_ROWS)


def open_clip(**options: int) -> Callable[..., Tensor]:
    """open_clip's loss as its training loop calls it: under autocast for 16-bit features."""
    loss_class = _open_clip_class()
    missing = options.keys() - inspect.signature(loss_class).parameters.keys()
    if missing:
        raise NotImplementedError(f"this open_clip's SigLipLoss has no {', '.join(missing)}")
    module = loss_class(**options)

    def loss(img: Tensor, txt: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        is_half = img.dtype != torch.float32
        with torch.autocast(img.device.type, dtype=img.dtype if is_half else None, enabled=is_half):
            return module(img, txt, log_scale.exp(), bias)

    return loss


def _open_clip_class() -> type[torch.nn.Module]:
    """From its own file: the package imports torchvision, which the loss has no use for."""
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss


def bytes_a_pair(forward: float, full: float) -> Callable[..., float]:
    """Least memory of an implementation that holds something for each of the B x B pairs."""

    def min_bytes(mode: Mode, *, B: int, D: int, dtype: torch.dtype) -> float:
        return B * B * (forward if mode == "forward" else full)

    return min_bytes


def cost(*, B: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    features_bytes = 2 * B * D * dtype.itemsize
    return {
        "forward": Cost(flops=2 * B * B * D, num_bytes=features_bytes),
        "full": Cost(flops=6 * B * B * D, num_bytes=2 * features_bytes),
    }


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    return Rival(
        build=lambda: partial(sigmoid_loss, backend=backend), needs_cuda=needs_cuda, is_ours=True
    )


# Adds up the captions' gradient in bfloat16.
_SIGLIP_KERNEL = {"module": "siglip_kernel", "pip": "siglip-kernel", "needs_cuda": True}
_SIGLIP_KERNEL |= {"max_error": APPROXIMATE}

_OTHER_SHAPES = [{"B": B, "D": D} for D in WIDTHS for B in SIZES if {"B": B, "D": D} != TARGET]

# Bytes a pair: eager and open_clip as measured at B = 8192 in bfloat16 (peak resident memory of
# a CPU run); compile keeps the product, and in the backward its gradient; open_clip's chunks are
# all saved for the backward, which takes as much as no chunks.
CASE = Case(
    x_name="B",
    x_label="image-text pairs",
    shapes=[{"B": 96, "D": 64}, TARGET, *_OTHER_SHAPES],
    # Larger than a chunk and no multiple of one, nor of a tile: the short last one has to be right.
    check_shapes={"cpu": {"B": 200, "D": 64}, "cuda": {"B": CHUNK_ROWS + 296, "D": 768}},
    regimes={f"scale {r['scale']:.0f}": r for r in (INITIAL, TRAINED)},
    make=make,
    reference=reference,
    rivals={
        "eager": Rival(build=lambda: eager, min_bytes=bytes_a_pair(8, 12)),
        "compile": Rival(
            build=lambda: torch.compile(eager, dynamic=False), min_bytes=bytes_a_pair(2, 4)
        ),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-cublas": ours("cublas", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
        "siglip2-normalize": Rival(
            build=lambda: partial(sigmoid_loss, normalize=True),
            reference=partial(reference, normalize=True),
            is_ours=True,
        ),
        "siglip-kernel": Rival(build=siglip_kernel, **_SIGLIP_KERNEL),
        "siglip-kernel-1024": Rival(build=siglip_kernel_small_chunks, **_SIGLIP_KERNEL),
        "open_clip": Rival(
            build=open_clip,
            module="open_clip",
            pip="open_clip_torch",
            min_bytes=bytes_a_pair(10, 10),
        ),
        "open_clip-chunked": Rival(
            build=partial(open_clip, chunk_size=CHUNK_ROWS),
            module="open_clip",
            pip="open_clip_torch",
            min_bytes=bytes_a_pair(0, 10),
        ),
    },
    cost=cost,
)
