"""Gradient scale and clip, AdamW, EMA teacher and half-precision copies in one pass."""

from .ema import average
from .op import fused_adamw

__all__ = ["average", "fused_adamw"]
