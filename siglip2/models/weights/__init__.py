"""Weights in four formats: transformers ("hf"), open_clip, timm (vision tower only) and big_vision.

Each format is one table of rules (`hf.py`, `open_clip.py`, `timm.py`, `big_vision.py`), read in
both directions, so what one writes the other reads back bit for bit. Nothing is ever unpickled.
"""
