"""The learned position table resampled to every image's own grid."""

from .op import posemb_resample

__all__ = ["posemb_resample"]
