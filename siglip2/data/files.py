"""Images as plain files: a folder with captions beside them, or a table that names them."""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip2.config import DataConfig
from siglip2.data.captions import captions_of_record, parse_captions
from siglip2.data.records import make_example, read_image
from siglip2.data.sources import IndexedSource
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class ImageFolder(IndexedSource):
    """A folder of images, at any depth, each with its caption in <stem>.txt or <stem>.json.

    Without these the sub-folder's name is the caption, and its images are one group.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.folder = folder
        self._paths = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not self._paths:
            raise DataError(f"folder {str(folder)!r} holds no images ({_listed(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        key = path.relative_to(self.folder).as_posix()
        captions, record = self._captions(path, key)
        return make_example(key, read_image(path, key), captions, record)

    def _captions(self, path: Path, key: str) -> tuple[dict[str, str], Mapping[str, Any]]:
        try:
            for suffix in (".json", ".txt"):
                sidecar = path.with_suffix(suffix)
                if not sidecar.is_file():
                    continue
                text = sidecar.read_text("utf-8")
                if suffix == ".txt":
                    return parse_captions(text), {}
                record = json.loads(text)
                if isinstance(record, dict) and (found := captions_of_record(record)):
                    return found, record
        except ValueError:
            raise BadSampleError("unreadable caption file", key) from None
        if path.parent == self.folder:
            return {}, {}
        label = path.parent.relative_to(self.folder).as_posix()
        return parse_captions(path.parent.name.replace("_", " ")), {"group": label}


class ImageTable(IndexedSource):
    """A .csv, .tsv or .jsonl with an image path (relative to the file) and captions in each row.

    Captions: the column `data.caption_column` (text, or JSON of language -> text), or columns
    caption_en, caption_de, ... The columns group, subset, language and regions are optional.
    """

    def __init__(self, path: Path, config: DataConfig):
        super().__init__(str(path))
        self.folder = path.parent
        self.image_column, self.caption_column = config.image_column, config.caption_column
        self._rows = _read_rows(path)
        columns = {name for row in self._rows for name in row or ()}
        captioned = self.caption_column in columns or any(
            isinstance(name, str) and name.startswith("caption_") for name in columns
        )
        if self.image_column not in columns or not captioned:
            raise DataError(
                f"{path} needs the columns {self.image_column!r} and {self.caption_column!r} (or "
                f"caption_en, caption_de, ...); it has {_listed(columns) or 'none'}. Set "
                "data.image_column and data.caption_column."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        if row is None:
            raise BadSampleError("malformed row", f"row {index + 1}")
        name = str(row.get(self.image_column) or "")
        if not name:
            raise BadSampleError("no image", f"row {index + 1}")
        captions = captions_of_record(row, self.caption_column)
        # The row's number keeps keys unique where several rows name one image.
        key = f"{name}#{index}"
        record = {**row, "group": row.get("group") or name}
        return make_example(key, read_image(self.folder / name, key), captions, record)


def _read_rows(path: Path) -> list[dict[str, Any] | None]:
    """The table's rows; None for a line that is no JSON object."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            return [_json_row(line) for line in file if line.strip()]
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def _json_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _listed(names: set) -> str:
    return ", ".join(sorted(map(str, names)))
