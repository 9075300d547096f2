"""Attention inside packed sequences of any lengths."""

from .attention import padded_attention, varlen_attention, varlen_qkv_attention
from .plan import VarlenPlan, make_plan, uniform_plan

__all__ = [
    "VarlenPlan",
    "make_plan",
    "padded_attention",
    "uniform_plan",
    "varlen_attention",
    "varlen_qkv_attention",
]
