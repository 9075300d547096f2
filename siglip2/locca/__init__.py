"""LocCa: captions, boxes of phrases and phrases of boxes, learned from images."""

from .draws import TextDraws
from .files import load_decoder, save_decoder
from .loss import CaptionLoss, LocCaLoss
from .tasks import ImageTexts, TaskText, box_to_text, text_to_box

__all__ = [
    "CaptionLoss",
    "ImageTexts",
    "LocCaLoss",
    "TaskText",
    "TextDraws",
    "box_to_text",
    "load_decoder",
    "save_decoder",
    "text_to_box",
]
