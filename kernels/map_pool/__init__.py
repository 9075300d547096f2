"""Attention pooling with one shared probe (MAP head), without keys and values."""

from .op import map_pool

__all__ = ["map_pool"]
