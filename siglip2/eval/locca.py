"""Evaluation of a captioning decoder: captions, boxes of phrases, phrases of boxes."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from siglip2.config import EvalConfig
from siglip2.data.tokenizer import get_tokenizer
from siglip2.errors import DataError, TextError
from siglip2.eval.captioning import Captions
from siglip2.eval.embed import inference
from siglip2.eval.grounding import Asked, ask_regions, box_scores, phrase_scores
from siglip2.locca.commands import Speaker
from siglip2.locca.files import CONFIG, load_decoder
from siglip2.models.decoder import Decoder
from siglip2.models.inputs import vision_inputs
from siglip2.models.siglip2 import Siglip2

if TYPE_CHECKING:
    from siglip2.eval.runner import EvalResult

MAX_IMAGES = 1000  # where the config sets no limit: words are said one at a time
NUM_EXAMPLES = 12


@dataclass(frozen=True)
class LocCaResult:
    """What a decoder knows of one source.

    `captions` has languages[tag], mean and what its baselines are taken from. `refer` (boxes of
    phrases) and `ground` (phrases of boxes) are empty for a source without regions. `examples` are
    images drawn by the seed alone: key, and regions with what was said of them.
    """

    num_images: int
    captions: dict[str, Any]
    refer: dict[str, Any] = field(default_factory=dict)
    ground: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Flat scalars: `captions/<language or mean>/accuracy`, `refer/accuracy`, ..."""
        tables = {f"captions/{x}": v for x, v in self.captions["languages"].items()}
        tables |= {"captions/mean": self.captions["mean"]}
        tables |= {"refer": self.refer, "ground": self.ground}
        return {
            f"{table}/{name}": value
            for table, values in tables.items()
            for name, value in values.items()
            if type(value) is float
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LocCaResult":
        """What `to_dict` gave. Raises DataError for anything else."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise DataError(f"no result of a decoder ({error}): run the evaluation again") from None


def look(speaker: Speaker, image: Any) -> tuple[Tensor, list[int]]:
    """Un-pooled vision tokens of a batch of any dialect, and how many each image has."""
    model = speaker.model
    inputs = vision_inputs(image, model.architecture.vision, model.device)
    return model.vision(*inputs, model.dtype).tokens, inputs.grid_hw.prod(1).tolist()


def evaluate_locca(
    speaker: Speaker,
    source: Any,
    *,
    max_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    train_captions: Iterable[Mapping[str, str]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LocCaResult:
    """Captions in every language and, where examples have regions, one phrase of each.

    Captions are guessed token by token from the true ones before; boxes and phrases are said
    greedily.

    Args:
        seed: Draws the language a region is asked for, and the examples to show.
        train_captions: Taken for the baselines of captions; None takes the source's own.
        progress: Called with a short sentence after each batch.

    Raises DataError for a source without an image or caption, TextError for a tokenizer that cannot
    encode without padding.
    """
    from siglip2.data import EvalLoader

    _, decoder, tokenizer, transform = speaker
    if not hasattr(tokenizer, "encode"):
        raise TextError(
            "need a tokenizer that a decoder can speak, with `encode`; got"
            f" {type(tokenizer).__name__}. Give siglip2.get_tokenizer its tokenizer.json or .model"
        )
    say = progress or (lambda text: None)
    captions, asked, keys = Captions(decoder, tokenizer), [], []
    loader = EvalLoader(source, transform, batch_size=batch_size, max_images=max_images)
    with inference(speaker.model):
        for batch in loader:
            vision, lengths = look(speaker, batch.image)
            captions.add(batch.captions, vision, lengths)
            asked += ask_regions(
                decoder,
                tokenizer,
                batch.keys,
                batch.regions,
                vision,
                lengths,
                batch_size=batch_size,
                seed=seed,
            )
            keys += batch.keys
            say(f"asking the decoder about {source.name}: {len(keys)} images")
    found = captions.result(train_captions)
    if not found["languages"] and not asked:
        raise DataError(f"need captions or regions to ask for; {source.name!r} has neither")
    return LocCaResult(
        len(keys),
        found,
        box_scores(asked, decoder.config.max_coordinate) if asked else {},
        phrase_scores(asked, tokenizer) if asked else {},
        _examples(keys, asked, seed),
    )


def _examples(keys: Sequence[str], asked: Sequence[Asked], seed: int) -> list[dict[str, Any]]:
    """Images drawn without a look at the answers; where some have regions, of those."""
    candidates = list(dict.fromkeys(found.key for found in asked)) or list(keys)
    chosen = random.Random(seed).sample(candidates, min(NUM_EXAMPLES, len(candidates)))
    names = ("phrase", "language", "box", "said_box", "said_phrase")
    of_image: dict[str, list[dict[str, Any]]] = {key: [] for key in chosen}
    for found in asked:
        if found.key in of_image:
            region = {name: getattr(found, name) for name in names}
            of_image[found.key].append({**region, "box": list(found.box)})
    return [{"key": key, "regions": regions} for key, regions in of_image.items()]


def find_speaker(
    folder: str | Path, model: Siglip2, tokenizer: Any, transform: Any
) -> Speaker | None:
    """`model` with the decoder in `folder`; None where there is none.

    Raises CheckpointError for a damaged decoder.
    """
    if not (Path(folder) / CONFIG).is_file():
        return None
    return make_speaker(model, load_decoder(folder, device=model.device), tokenizer, transform)


def make_speaker(
    model: Siglip2, decoder: Decoder | None, tokenizer: Any, transform: Any
) -> Speaker | None:
    """None without a decoder. A tokenizer shorter than what the decoder says is lengthened."""
    if decoder is None:
        return None
    longer = get_tokenizer(tokenizer, text_length=decoder.config.length, strict=False)
    return Speaker(model, decoder, longer, transform)


def add_locca(
    result: "EvalResult",
    speaker: Speaker | None,
    sources: Mapping[str, Any],
    config: EvalConfig,
    *,
    progress: Callable[[str], None] | None = None,
) -> "EvalResult":
    """`result` with `evaluate_locca` of each source; as it is without a speaker."""
    if speaker is None:
        return result
    found = {
        name: evaluate_locca(
            speaker,
            source,
            max_images=config.max_images or MAX_IMAGES,
            batch_size=config.batch_size,
            progress=progress,
        )
        for name, source in sources.items()
    }
    return replace(result, locca=found)
