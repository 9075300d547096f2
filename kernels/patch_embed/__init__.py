"""Patches to tokens: value range, projection, mask token and position in one pass."""

from .op import patch_embed

__all__ = ["patch_embed"]
