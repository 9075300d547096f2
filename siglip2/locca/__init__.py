"""LocCa: captions, boxes of phrases and phrases of boxes, learned from images."""

from .files import load_decoder, save_decoder
from .loss import CaptionLoss, LocCaLoss, locca_losses
from .tasks import ImageTexts, TaskText, box_to_text, text_to_box

__all__ = [
    "CaptionLoss",
    "ImageTexts",
    "LocCaLoss",
    "TaskText",
    "box_to_text",
    "load_decoder",
    "locca_losses",
    "save_decoder",
    "text_to_box",
]
