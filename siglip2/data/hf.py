"""Data sets of the `datasets` library: a hub name, a save_to_disk folder, or parquet files."""

from pathlib import Path
from typing import Any

from siglip2.config import DataConfig
from siglip2.data.captions import captions_of_record
from siglip2.data.records import make_example
from siglip2.data.sources import IndexedSource
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError, require


class HfDataset(IndexedSource):
    """Rows of a `datasets.Dataset`; images stay encoded until a loader decodes them."""

    def __init__(self, name: str, dataset: Any, config: DataConfig):
        super().__init__(name)
        datasets = require("datasets", "hf")
        self.image_column, self.caption_column = config.image_column, config.caption_column
        columns = dataset.column_names
        captioned = self.caption_column in columns or any(c.startswith("caption_") for c in columns)
        if self.image_column not in columns or not captioned:
            raise DataError(
                f"{name} needs the columns {self.image_column!r} and {self.caption_column!r} (or "
                f"caption_en, caption_de, ...); it has {', '.join(columns)}. Set data.image_column "
                "and data.caption_column."
            )
        if isinstance(dataset.features[self.image_column], datasets.Image):
            dataset = dataset.cast_column(self.image_column, datasets.Image(decode=False))
        self._rows = dataset

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        key = str(row.get("key") or index)
        captions = captions_of_record(row, self.caption_column)
        return make_example(key, _encoded(row[self.image_column], key), captions, row)


def _encoded(value: Any, key: str) -> bytes:
    """Bytes of an encoded image: themselves, in a {"bytes", "path"} record, or in a file."""
    path = value
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
    if isinstance(value, bytes):
        return value
    if not isinstance(path, str):
        raise BadSampleError("no image", key)
    try:
        return Path(path).read_bytes()
    except OSError:
        raise BadSampleError("missing image file", key) from None


def _load(name: str) -> Any:
    """A Dataset or a dictionary of them."""
    datasets = require("datasets", "hf")
    path = Path(name).expanduser()
    if not path.exists():
        return datasets.load_dataset(name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    if any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path))


def open_hf(spec: str, config: DataConfig) -> HfDataset:
    """NAME_OR_FOLDER[:split]; the split is "train" unless given."""
    name, split = spec, None
    if not Path(spec).expanduser().exists() and ":" in spec:
        name, _, split = spec.rpartition(":")
    try:
        loaded = _load(name)
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"datasets cannot load {name!r}: {first_line}") from error
    if isinstance(loaded, dict):
        split = split or "train"
        if split not in loaded:
            raise DataError(f"hf:{name} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    elif split is not None:
        raise DataError(f"hf:{name} is a single split; drop ':{split}'")
    return HfDataset(f"hf:{spec}", loaded, config)
