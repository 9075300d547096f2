"""What the decoder is asked about training examples, drawn anew each time an image is seen."""

from collections.abc import Sequence

import numpy as np

from ..data.regions import Region
from .packing import draw_parallel
from .tasks import MAX_COORDINATE, Encoder, ImageTexts, TaskText, task_texts


class TextDraws:
    """`draws(caption, regions, rng)`: an image's texts in tokens, for `LocCaLoss.pack_tokens`.

    The caption, and one of its regions under one of its names, asked for both ways (LocCa, section
    3.1). It runs where examples are read, so it must pickle.

    Args:
        length: Tokens of a text at most.
        max_coordinate: Boxes are whole numbers up to this.
        parallel_share: Of captions that are guessed all at once (SigLIP 2, section 2.2).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        length: int,
        parallel_share: float = 0.5,
        max_coordinate: int = MAX_COORDINATE,
    ):
        self.encoder, self.length = encoder, length
        self.parallel_share, self.max_coordinate = parallel_share, max_coordinate

    def __call__(
        self, caption: str, regions: Sequence[Region], rng: np.random.Generator
    ) -> list[TaskText]:
        said = ImageTexts(caption)
        if regions:
            region = regions[int(rng.integers(len(regions)))]
            names = list(region.phrases.values())
            said = ImageTexts(caption, names[int(rng.integers(len(names)))], region.box)
        texts = task_texts(said, self.encoder, self.length, self.max_coordinate)
        return draw_parallel(texts, self.parallel_share, rng)
