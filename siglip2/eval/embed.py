"""A source as embeddings: each image once, each distinct caption once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from siglip2.data.types import PackedImages
from siglip2.eval.zero_shot import Tokenizer
from siglip2.models.siglip2 import Siglip2

_SAME = 1e-5  # largest difference between embeddings of one picture from two batches
_SAME_CHUNK = 512


class EmbeddedImages(NamedTuple):
    img: Tensor  # (N, D) float32, unit rows, on the model's device
    captions: list[Mapping[str, str]]  # language -> caption
    groups: list[str]
    subsets: list[str]
    keys: list[str]
    num_patches: float = 0.0  # mean over images; 0 for a fixed resolution


class TextTable(NamedTuple):
    """Distinct texts and their embeddings; case is ignored, as SigLIP 2 lower-cases."""

    txt: Tensor  # (M, D) float32, unit rows
    index: dict[str, int]  # lower-cased text -> row

    def rows(self, texts: Iterable[str]) -> Tensor:  # (len(texts), D)
        rows = [self.index[text.lower()] for text in texts]
        return self.txt[torch.tensor(rows, device=self.txt.device)]


@contextmanager
def inference(model: Siglip2) -> Iterator[None]:
    """Evaluation mode without gradients; the model's mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def embed_images(
    model: Siglip2, batches: Iterable, *, progress: Callable[[int], None] | None = None
) -> EmbeddedImages:
    """Embeddings of an `EvalLoader`'s batches; `progress` gets the number of images done."""
    parts, found, num_patches = [], EmbeddedImages(torch.empty(0), [], [], [], []), 0
    for batch in batches:
        parts.append(model.encode_image(batch.image, normalize=True))
        found.captions.extend(batch.captions)
        found.groups.extend(batch.groups)
        found.subsets.extend(batch.subsets)
        found.keys.extend(batch.keys)
        if isinstance(batch.image, PackedImages):
            num_patches += batch.image.patches.shape[0]
        if progress:
            progress(len(found.keys))
    if not parts:
        return found
    return found._replace(img=torch.cat(parts), num_patches=num_patches / len(found.keys))


def same_picture(
    img: Tensor,  # (N, D) unit rows
    groups: Sequence[str],
) -> list[int]:
    """For each image the first of its group with the same embedding, up to rounding: often itself.

    A table of five captions a picture holds it five times. As five images it would fill the first
    five places of every ranking.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    first = list(range(len(groups)))
    for rows in members.values():
        z = img[torch.tensor(rows, device=img.device)]
        for start in range(0, len(rows) if len(rows) > 1 else 0, _SAME_CHUNK):
            part = z[start : start + _SAME_CHUNK]
            same = torch.cdist(part, z, p=float("inf")) < _SAME
            for offset, earliest in enumerate(same.int().argmax(1).tolist()):
                first[rows[start + offset]] = rows[min(earliest, start + offset)]
    return first


def embed_texts(
    model: Siglip2,
    captions: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
) -> TextTable:
    """Embeddings of all distinct captions; one that several languages share is encoded once."""
    distinct: dict[str, str] = {}
    for caption in captions:
        for text in caption.values():
            distinct.setdefault(text.lower(), text)
    texts = list(distinct.values())
    parts = [
        model.encode_text(tokenizer(texts[start : start + batch_size]), normalize=True)
        for start in range(0, len(texts), batch_size)
    ]
    txt = torch.cat(parts) if parts else torch.empty(0)
    return TextTable(txt, {text: row for row, text in enumerate(distinct)})


def text_groups(
    captions: Sequence[Mapping[str, str]], groups: Sequence[str], language: str
) -> dict[str, set[str]]:
    """Distinct captions of a language -> the groups that carry it.

    Two concepts of one name have one text, which is right for both: no model could tell two apart.
    """
    spelling: dict[str, str] = {}
    found: dict[str, set[str]] = {}
    for caption, group in zip(captions, groups, strict=True):
        if language in caption:
            text = spelling.setdefault(caption[language].lower(), caption[language])
            found.setdefault(text, set()).add(group)
    return found
