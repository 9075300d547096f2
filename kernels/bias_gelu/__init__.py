"""GELU after a bias, with the bias's gradient in the backward's only pass."""

from .op import bias_gelu

__all__ = ["bias_gelu"]
