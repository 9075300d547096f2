"""Towers on packed sequences, presets, and weights in four formats."""
