"""Colour, blur and solarisation of a batch of crops, each with numbers of its own (DINO).

Operations follow torchvision's definitions; colour changes come in one order (brightness,
contrast, saturation, hue) where torchvision draws the order anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import ViewConfig

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2


def photometric(
    x: Tensor,  # (N, 3, S, S) in [0, 1]
    config: ViewConfig,
    *,
    blur: float,
    solarize: float,
    generator: torch.Generator,
) -> Tensor:  # (N, 3, S, S) in [0, 1]
    """Changes drawn for each image: probabilities `blur` and `solarize`, the rest of `config`.

    A change of probability 0 costs nothing.
    """
    N = len(x)

    def draw() -> Tensor:
        return torch.rand(N, 1, 1, 1, generator=generator, device=x.device).to(x.dtype)

    if config.jitter > 0:
        x = torch.where(draw() < config.jitter, _jittered(x, config, draw), x)
    if config.grayscale > 0:
        x = torch.where(draw() < config.grayscale, grey(x).expand_as(x), x)
    if blur > 0:
        low, high = config.blur_px
        matrix = gaussian(low + draw() * (high - low), x.shape[-1])
        x = torch.where(draw() < blur, matrix @ x @ matrix.mT, x)
    if solarize > 0:
        x = torch.where((draw() < solarize) & (x >= 128 / 255), 1 - x, x)
    return x


def _jittered(x: Tensor, config: ViewConfig, draw: Callable[[], Tensor]) -> Tensor:
    def around_one(most: float) -> Tensor:
        return 1 + most * (2 * draw() - 1)

    x = (x * around_one(config.brightness)).clamp(0, 1)
    x = _blend(x, grey(x).mean((1, 2, 3), keepdim=True), around_one(config.contrast))
    x = _blend(x, grey(x), around_one(config.saturation))
    return shifted_hue(x, config.hue * (2 * draw() - 1))


def _blend(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (share * x + (1 - share) * other).clamp(0, 1)


def grey(x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 1, H, W)
    r, g, b = x.unbind(1)
    return (_GREY[0] * r + _GREY[1] * g + _GREY[2] * b)[:, None]


def shifted_hue(x: Tensor, turns: Tensor) -> Tensor:  # (N, 3, H, W), (N, 1, 1, 1)
    """Hue turned with saturation and value kept, without the detour over HSV's six cases.

    A channel is value - chroma clamp(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6 and n = 5, 3
    and 1 for red, green and blue.
    """
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        value == r,
        (g - b) / divisor,
        torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    n = 5 - 2 * torch.arange(3, device=x.device, dtype=x.dtype).view(3, 1, 1)
    k = (n + sixths + 6 * turns) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian(deviation: Tensor, size: int) -> Tensor:  # (N, ...) -> (N, ..., size, size)
    """Blur of a row of `size` pixels as a matrix; what falls outside is left out of the mean."""
    at = torch.arange(size, device=deviation.device, dtype=deviation.dtype)
    taps = (-((at - at[:, None]) ** 2) / (2 * deviation**2)).exp()
    return taps / taps.sum(-1, keepdim=True)
