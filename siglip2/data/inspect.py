"""What a source holds, and what is wrong with it."""

import statistics
from collections import Counter
from dataclasses import dataclass

from siglip2.config import DataConfig
from siglip2.data.captions import base_language
from siglip2.data.images import decode_image
from siglip2.data.sources import ShardSource, iterate, open_source
from siglip2.data.types import BadSampleError


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over the examples that were read; str() is a table for people."""

    source: str
    total: int | None  # examples in the source; None: streamed, and not read to the end
    good: int
    groups: int
    subsets: dict[str, int]
    languages: dict[str, int]  # captions in each, most frequent first
    caption_chars: tuple[int, int, int]  # least, median, most
    regions: tuple[int, int]  # in all, examples that have some
    image_px: tuple[
        tuple[int, int], ...
    ]  # (width, height) of the smallest, median, largest picture
    bad: dict[str, int]  # reason -> examples

    def __str__(self) -> str:
        languages = list(self.languages.items())
        least, median, most = self.caption_chars
        read = self.good + sum(self.bad.values())
        shown = ", ".join(f"{tag} {n}" for tag, n in languages[:20])
        more = f", and {len(languages) - 20} more" if len(languages) > 20 else ""
        subsets = ", ".join(f"{name or '-'} {n}" for name, n in self.subsets.items())
        bad = ", ".join(f"{reason} {n}" for reason, n in self.bad.items())
        of_total = f" of {self.total}" if self.total is not None else ""
        return "\n".join(
            [
                f"source     {self.source}",
                f"examples   {self.good} good of {read} read{of_total}",
                f"groups     {self.groups}",
                f"subsets    {subsets}",
                f"languages  {len(languages)}: {shown}{more}",
                f"captions   {least} to {most} characters, median {median}",
                f"regions    {self.regions[0]} on {self.regions[1]} images",
                "images     "
                + ", ".join(f"{w}x{h}" for w, h in self.image_px)
                + " (least, median, most)",
                f"bad        {bad or 'none'}",
            ]
        )


def inspect(spec: str, config: DataConfig | None = None, *, limit: int | None = 10_000) -> Summary:
    """Read and decode up to `limit` examples of a source (None: all) and count what they are.

    Raises DataError if the source cannot be opened.
    """
    config = config or DataConfig()
    source = open_source(spec, config)
    bad: Counter[str] = Counter()
    subsets: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    groups: set[str] = set()
    chars: list[int] = []
    sizes: list[tuple[int, int]] = []
    regions: list[int] = []
    read = 0
    complete = True
    for item in iterate(source):
        if read == limit:
            complete = False
            break
        read += 1
        try:
            if isinstance(item, BadSampleError):
                raise item
            image = decode_image(item.image, max_image_pixels=config.max_image_pixels)
        except BadSampleError as error:
            bad[error.reason] += 1
            continue
        sizes.append(image.size)
        groups.add(item.group)
        regions.append(len(item.regions))
        subsets[item.subset] += 1
        languages.update(base_language(tag) for tag in item.captions)
        chars += [len(text) for text in item.captions.values()]
    sizes.sort(key=lambda size: size[0] * size[1])
    total = read if complete else None if isinstance(source, ShardSource) else len(source)
    return Summary(
        source=source.name,
        total=total,
        good=len(sizes),
        groups=len(groups),
        subsets=dict(sorted(subsets.items())),
        languages=dict(languages.most_common()),
        caption_chars=(min(chars), round(statistics.median(chars)), max(chars))
        if chars
        else (0, 0, 0),
        regions=(sum(regions), sum(map(bool, regions))),
        image_px=(sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else (),
        bad=dict(bad.most_common()),
    )
