"""LocCa: captions, boxes of phrases and phrases of boxes, learned from images."""

from .loss import CaptionLoss, LocCaLoss
from .tasks import ImageTexts, TaskText, box_to_text, text_to_box

__all__ = ["CaptionLoss", "ImageTexts", "LocCaLoss", "TaskText", "box_to_text", "text_to_box"]
