"""Pure functions of examples seen."""

import math


def warmup_cosine(
    examples: float, *, warmup: float, total: float, floor: float = 0.0, start: float = 0.0
) -> float:
    """Share of the peak learning rate.

    Linear warm-up times a cosine that reaches `floor` at `total`.
    big_vision's schedule: the cosine runs over what follows the warm-up, and is 1 during it.
    It begins at the share `start` of its way, where another stage left it.
    """
    ramp = min(1.0, examples / warmup) if warmup > 0 else 1.0
    progress = (examples - warmup) / max(total - warmup, 1)
    progress = start + (1 - start) * min(max(progress, 0.0), 1.0)
    return ramp * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
