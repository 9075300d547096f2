"""Where examples come from: one interface for the quick start, tars, folders, tables, COCO, HF."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from siglip2.config import DataConfig
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# Local tars up to this size are indexed and read in any order; larger ones are streamed.
INDEXED_TARS_BYTES = 1 << 30
_KINDS = (
    "'quickstart:train', 'scenes:train', tars 'x-{000..007}.tar' (also globs and a.tar::b.tar), a "
    "folder of images, a .csv, .tsv, .jsonl or .parquet file, 'hf:NAME_OR_FOLDER[:split]', or "
    "'coco:ANNOTATIONS.json[,CAPTIONS.json][:IMAGES_FOLDER]'"
)


class IndexedSource(ABC):
    """Examples at hand by number. Reading one may raise BadSampleError."""

    tokenizer_path: Path | None = None  # a vocabulary that belongs to the data

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...


class ShardSource(ABC):
    """Examples in shards that are read front to back."""

    tokenizer_path: Path | None = None

    def __init__(
        self,
        name: str,
        shards: list[str],
        *,
        train_num_samples: int | None = None,
        resampled: bool = False,
    ):
        self.name = name
        self.shards = shards
        self.train_num_samples = train_num_samples  # in one epoch, over all readers; None: all
        self.resampled = resampled  # shards are drawn with replacement

    @abstractmethod
    def read(self, shard: str) -> Iterator[Example | BadSampleError]:
        """The shard's examples in order; a damaged one comes as the error that says why."""


Source = IndexedSource | ShardSource


def iterate(source: Source) -> Iterator[Example | BadSampleError]:
    """Everything once, in order; a damaged example comes as the error that says why."""
    if isinstance(source, ShardSource):
        for shard in source.shards:
            yield from source.read(shard)
        return
    for index in range(len(source)):
        try:
            yield source[index]
        except BadSampleError as error:
            yield error


def _open_quickstart(part: str, config: DataConfig) -> Source:
    from siglip2.data.quickstart import quickstart_shards
    from siglip2.data.tars import IndexedTars

    shards = quickstart_shards(part, config.quickstart)
    source = IndexedTars(f"quickstart:{part}", [str(path) for path in shards])
    source.tokenizer_path = shards[0].parent / "tokenizer.json"
    return source


def _open_scenes(part: str, config: DataConfig) -> Source:
    from siglip2.data.scenes import Scenes, write_vocabulary

    if part not in ("train", "heldout"):
        raise DataError(f"scenes are 'scenes:train' or 'scenes:heldout'; got 'scenes:{part}'")
    held_out = part == "heldout"
    drawings = _open_quickstart("train", config)
    scenes = Scenes(drawings, count=1_000 if held_out else 1_000_000, held_out=held_out)
    scenes.tokenizer_path = write_vocabulary(scenes, drawings.tokenizer_path.parent)
    return scenes


def _open_tars(spec: str, config: DataConfig) -> Source:
    from siglip2.data.tars import IndexedTars, StreamedTars, expand_shards

    shards = expand_shards(spec)
    streamed = config.resampled or config.train_num_samples is not None
    if not streamed and all(Path(s).is_file() and s.endswith(".tar") for s in shards):
        streamed = sum(Path(s).stat().st_size for s in shards) > INDEXED_TARS_BYTES
        if not streamed:
            return IndexedTars(spec, shards)
    return StreamedTars(
        spec, shards, train_num_samples=config.train_num_samples, resampled=config.resampled
    )


def open_source(spec: str, config: DataConfig | None = None) -> Source:
    """Open what `spec` names; DataError says what is accepted and what was found.

    Captions come with their languages where the data says so, else as "und".
    """
    config = config or DataConfig()
    kind, _, rest = spec.partition(":")
    if kind == "quickstart":
        return _open_quickstart(rest or "train", config)
    if kind == "scenes":
        return _open_scenes(rest or "train", config)
    if kind == "hf":
        from siglip2.data.hf import open_hf

        return open_hf(rest, config)
    if kind == "coco":
        from siglip2.data.coco import open_coco

        return open_coco(rest)
    if ".tar" in spec or re.match(r"(pipe:|\w+://)", spec):
        return _open_tars(spec, config)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(f"no data at {spec!r}: need {_KINDS}")
    if (path.is_dir() and any(path.rglob("*.parquet"))) or path.suffix == ".parquet":
        from siglip2.data.hf import open_hf

        return open_hf(spec, config)
    if path.is_dir():
        from siglip2.data.files import ImageFolder

        return ImageFolder(path)
    if path.suffix == ".json":
        from siglip2.data.coco import open_coco

        return open_coco(spec)
    if path.suffix in TABLE_SUFFIXES:
        from siglip2.data.files import ImageTable

        return ImageTable(path, config)
    raise DataError(f"cannot tell what {spec!r} is: need {_KINDS}")
