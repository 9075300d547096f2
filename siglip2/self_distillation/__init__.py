"""Self-distillation (SILC) and masked prediction (TIPS): SigLIP 2, section 2.3."""

from .config import HeadConfig, SslConfig, ViewConfig
from .heads import HeadOutput, PrototypeHead, TaughtHead
from .losses import MaskedPredictionLoss, SelfDistillationLoss, Targets
from .masks import Masks, draw_masks
from .parts import take_prepared
from .stage import Prepared, SslOutput, SslStage
from .teacher import Pairs, cosine_momentum, ema_update, fixed_momentum
from .views import Views, draw_views

__all__ = [
    "HeadConfig",
    "HeadOutput",
    "MaskedPredictionLoss",
    "Masks",
    "Pairs",
    "Prepared",
    "PrototypeHead",
    "SelfDistillationLoss",
    "SslConfig",
    "SslOutput",
    "SslStage",
    "TaughtHead",
    "Targets",
    "ViewConfig",
    "Views",
    "cosine_momentum",
    "draw_masks",
    "draw_views",
    "ema_update",
    "fixed_momentum",
    "take_prepared",
]
