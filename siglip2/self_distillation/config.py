"""Every size and rate of the stage, with its source.

SILC is arXiv:2310.13355, TIPS arXiv:2410.16512, TIPSv2 arXiv:2604.12012, DINO arXiv:2104.14294 and
DINOv2 arXiv:2304.07193. "Not published" is said of SigLIP 2 (arXiv:2502.14786, section 2.3), which
follows SILC and TIPS where it names no number.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

# Of both losses, by the tower's width (section 2.3): B, L, So400m, g.
SIZE_FACTORS = {768: 0.25, 1024: 0.5, 1152: 1.0, 1536: 0.5}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """MLP, unit length, prototypes. Its shape is not published: DINO's reference head."""

    depth: int = 3  # linear layers before the prototypes (DINO)
    hidden_width: int = 2048  # (DINO)
    bottleneck: int = 256  # width that is brought to unit length (DINO)
    prototypes: int = 65_536  # not published; SILC's, from memory. TIPS: 32,768


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What the losses see of an image, besides the image itself."""

    num_local: int = 8  # section 2.3
    local_px: int | None = None  # None: 3/8 of the image's side, 96 at 256 (SILC); else unpublished
    global_px: int | None = None  # None: the model's own side; 256 (SILC)
    local_area: tuple[float, float] = (0.05, 0.4)  # of the image's (SILC)
    global_area: tuple[float, float] = (0.4, 1.0)  # (SILC)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, log-uniform (DINO)
    flip: float = 0.5  # probability, as all below (DINO)
    # Not published whether any of what follows is used, so as DINO. `crops_alone` is without.
    jitter: float = 0.8
    brightness: float = 0.4  # factors are drawn from 1 - x to 1 + x
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shift, in turns, from -x to x
    grayscale: float = 0.2
    local_blur: float = 0.5
    global_blur: float = 0.1  # DINO's second global view
    blur_px: tuple[float, float] = (0.1, 2.0)  # deviation
    solarize: float = 0.2  # global view alone, as DINO's second

    def crops_alone(self) -> "ViewConfig":
        """Without photometric changes."""
        none = ("jitter", "grayscale", "local_blur", "global_blur", "solarize")
        return replace(self, **dict.fromkeys(none, 0.0))


@dataclass(frozen=True, kw_only=True)
class SslConfig:
    """Self-distillation (SILC) and masked prediction (TIPS) beside the losses of all training."""

    start_share: float = 0.8  # of the run's examples, when the stage begins (section 2.3)
    distillation_weight: float = 1.0  # section 2.3; 0: the head is not built
    masked_weight: float = 0.25  # section 2.3; 0: the head is not built
    size_factor: float | None = None  # of both; None: `SIZE_FACTORS`, 0.25 at other widths
    student_temp: float = 0.1  # not published; SILC's, from memory
    teacher_temp: float = 0.04  # not published; SILC's, from memory
    balance: Literal["centring", "sinkhorn"] = "centring"  # not published; SILC: centring
    centre_momentum: float = 0.9  # not published; SILC's, from memory
    sinkhorn_iterations: int = 3  # (DINOv2)
    ema_momentum: float = 0.966  # not published; SILC's, from memory: may be a misprint of 0.996
    ema_scope: Literal["full", "heads"] = "full"  # section 2.3; "heads" (TIPSv2)
    shared_head: bool = False  # not published: "heads"
    mask_share: float = 0.5  # of each image's patches, rounded down (section 2.3)
    mask_layout: Literal["random", "blocks"] = "random"  # not published; TIPS: random
    loss_tokens: Literal["masked", "all"] = "masked"  # section 2.3; "all" (TIPSv2)
    visible_weight: float = 1.0  # of the mean over visible patches, with "all"; not published
    pack: Literal["all", "branch"] = "all"  # all views in one pass, or a pass for each kind
    head: HeadConfig = field(default_factory=HeadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def factor(self, width: int) -> float:
        """What both weights are multiplied by for a vision tower of this width."""
        return SIZE_FACTORS.get(width, 0.25) if self.size_factor is None else self.size_factor

    def begins_at(self, examples: int) -> float:
        """Examples seen when the stage begins, in a run of `examples`."""
        return self.start_share * examples
