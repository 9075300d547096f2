"""Webdataset tars: indexed when they are small and local, otherwise streamed."""

import glob
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from siglip2.data.captions import captions_of_record, parse_captions
from siglip2.data.records import make_example
from siglip2.data.sources import IndexedSource, ShardSource
from siglip2.data.types import BadSampleError, Example
from siglip2.errors import DataError, require

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_FIELDS = (*IMAGE_FIELDS, "txt", "json")
_DAMAGED = "damaged shard"


def expand_shards(spec: str) -> list[str]:
    """Shards of 'a-{000..007}.tar', 'a-*.tar' or 'a.tar::b.tar'; URLs and pipe: as they are."""
    require("webdataset", "data")
    from webdataset.shardlists import expand_urls

    shards: list[str] = []
    for shard in expand_urls(spec):
        if shard.startswith("pipe:") or "://" in shard:
            shards.append(shard)
            continue
        local = os.path.expanduser(shard)
        found = sorted(glob.glob(local)) if glob.has_magic(local) else [local]
        missing = [path for path in found if not Path(path).is_file()]
        if missing or not found:
            raise DataError(f"no shard {(missing or [shard])[0]!r} (of {spec!r})")
        shards += found
    return shards


def _example_of(key: str, fields: Mapping[str, bytes]) -> Example:
    """Raises BadSampleError: no image, no caption, or a sidecar that cannot be read."""
    image = next((fields[name] for name in IMAGE_FIELDS if name in fields), None)
    if image is None:
        raise BadSampleError("no image", key)
    record: dict = {}
    try:
        if "json" in fields:
            loaded = json.loads(fields["json"])
            record = loaded if isinstance(loaded, dict) else {}
        captions = captions_of_record(record)
        if not captions and "txt" in fields:
            captions = parse_captions(fields["txt"].decode())
    except ValueError:
        raise BadSampleError("unreadable caption file", key) from None
    return make_example(key, image, captions, record)


class _Entry(NamedTuple):
    shard: int
    key: str
    fields: tuple[tuple[str, int, int], ...]  # extension, offset, bytes; none: the shard is damaged


def _index(path: str, shard: int) -> Iterator[_Entry]:
    """Neighbouring members with one name up to its first dot make an example."""
    from webdataset.tariterators import base_plus_ext

    key, fields = None, []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                base, extension = base_plus_ext(member.name)
                if not member.isreg() or base is None:
                    continue
                if base != key and fields:
                    yield _Entry(shard, key, tuple(fields))
                    fields = []
                key = base
                if extension.lower() in _FIELDS:
                    fields.append((extension.lower(), member.offset_data, member.size))
    except (tarfile.TarError, EOFError):
        yield _Entry(shard, path, ())  # in place of the example that was cut
        return
    if fields:
        yield _Entry(shard, key, tuple(fields))


class IndexedTars(IndexedSource):
    """Local uncompressed tars, read in any order."""

    def __init__(self, name: str, shards: list[str]):
        super().__init__(name)
        self.shards = shards
        self._entries = [e for i, path in enumerate(shards) for e in _index(path, i)]
        self._files: dict[int, int] = {}
        if not self._entries:
            raise DataError(f"{name!r} holds no images ({', '.join(IMAGE_FIELDS)})")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        shard, key, fields = self._entries[index]
        if not fields:
            raise BadSampleError(_DAMAGED, key)
        try:
            if shard not in self._files:
                self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
            # pread, because forked readers share the file's position.
            read = {name: os.pread(self._files[shard], size, at) for name, at, size in fields}
        except OSError:
            raise BadSampleError("unreadable shard", self.shards[shard]) from None
        return _example_of(key, read)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)


class StreamedTars(ShardSource):
    """Tars of any size and place (path, URL, pipe: command), read front to back."""

    def read(self, shard: str) -> Iterator[Example | BadSampleError]:
        require("webdataset", "data")
        from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

        damage: list[str] = []

        def note(error: Exception) -> bool:
            damage.append(type(error).__name__)
            return True

        files = tar_file_expander(url_opener([{"url": shard}], handler=note), handler=note)
        for sample in group_by_keys(files, suffixes=set(_FIELDS), handler=note):
            try:
                yield _example_of(sample["__key__"], sample)
            except BadSampleError as error:
                yield error
        if damage:
            yield BadSampleError(_DAMAGED, f"{shard} ({damage[0]})")
