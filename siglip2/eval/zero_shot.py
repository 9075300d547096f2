"""Zero-shot classification: a linear classifier made of text embeddings.

Each class is the normalised mean of the unit embeddings of its prompts. Prompts are canonicalised
as in big_vision's evaluator (underscores to spaces, ASCII punctuation removed, lower case).
Training only lower-cases, so retrieval does not canonicalise.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from siglip2.errors import DataError
from siglip2.eval.retrieval import check_finite, ranks
from siglip2.models.siglip2 import Siglip2, normalize

Tokenizer = Callable[[list[str]], Tensor]  # texts -> ids (B, L)
Template = str | Callable[[str], str]  # "a photo of a {}", or a function as in open_clip's lists

_NO_PUNCTUATION = str.maketrans({"_": " "} | {c: "" for c in string.punctuation if c != "_"})


class ClassSet(NamedTuple):
    """What to tell apart: `labels` are the data's words for it, `names` the prompts'."""

    labels: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)


def canonicalize(text: str) -> str:
    """Underscores to spaces, ASCII punctuation removed, lower case, single spaces."""
    return " ".join(text.translate(_NO_PUNCTUATION).lower().split())


def _prompt(template: Template, name: str) -> str:
    if callable(template):
        return canonicalize(template(name))
    if "{}" not in template:
        raise ValueError(
            f"need '{{}}' in each template, where the class name goes; got {template!r}"
        )
    return canonicalize(template.replace("{}", name))


@torch.inference_mode()
def zero_shot_classifier(
    model: Siglip2,
    classnames: Sequence[str],
    templates: Sequence[Template],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 256,
) -> Tensor:  # (D, C) float32, unit columns
    """Text embeddings as a linear classifier; open_clip's `build_zero_shot_classifier` in one call.

    Args:
        templates: Strings with `{}`, or functions of the class name.
        batch_size: Prompts in one forward.
    """
    if not classnames or not templates:
        raise ValueError(
            f"need class names and templates; got {len(classnames)} names,"
            f" {len(templates)} templates"
        )
    prompts = [_prompt(template, name) for name in classnames for template in templates]
    owner = torch.arange(len(classnames), device=model.device).repeat_interleave(len(templates))
    sums = None
    for start in range(0, len(prompts), batch_size):
        z = model.encode_text(tokenizer(prompts[start : start + batch_size]), normalize=True)
        if sums is None:
            sums = z.new_zeros(len(classnames), z.shape[1])
        sums.index_add_(0, owner[start : start + batch_size], z)
    return normalize(sums / len(templates)).T


def classify(
    img: Tensor,  # (N, D) unit rows
    classifier: Tensor,  # (D, C) unit columns
    log_scale: Tensor,  # ()
    bias: Tensor,  # ()
    *,
    activation: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:  # (N, C)
    """Class scores.

    "softmax": shares of one; the bias cancels. "sigmoid": for each class by itself, how likely
    image and text belong together, as the loss was trained; rows do not sum to one and may be
    all near zero. Both order the classes in the same way.
    """
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"need activation 'softmax' or 'sigmoid'; got {activation!r}")
    z = log_scale.float().exp() * (img.float() @ classifier.float()) + bias.float()
    return z.softmax(-1) if activation == "softmax" else z.sigmoid()


def top_k_accuracy(
    img: Tensor,  # (N, D) unit rows
    classifier: Tensor,  # (D, C) unit columns
    target: Tensor,  # (N,) int64
    *,
    ks: Sequence[int] = (1, 5),
    chunk_size: int = 4096,
) -> dict[int, float]:
    """Fraction of images whose class is among the k best; ties count as wrong, as in retrieval."""
    check_finite(img, "image")
    check_finite(classifier.T, "class")
    labels = [str(i) for i in target.tolist()]
    classes = [str(i) for i in range(classifier.shape[1])]
    rank = ranks(img, classifier.T, labels, classes, chunk_size=chunk_size).rank
    return {k: float((rank < k).double().mean()) for k in ks}


def read_classes(path: str | Path) -> ClassSet:
    """Classes from a JSON file `{"classes": [...], "templates": [...]}`.

    "classes" may also map the data's labels to names (`{"n01440764": "tench"}`). Templates default
    to "{}". Raises DataError when the file is not that.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"eval.classes: no file {path}") from None
    except ValueError as error:
        raise DataError(f"eval.classes: {path} is not JSON: {error}") from None
    classes = data.get("classes") if isinstance(data, dict) else None
    templates = data.get("templates", ["{}"]) if classes else None
    pairs = list(classes.items()) if isinstance(classes, dict) else [(c, c) for c in classes or []]
    words = [word for pair in pairs for word in pair] + (templates or [])
    if not pairs or not templates or not all(isinstance(word, str) for word in words):
        raise DataError(
            'eval.classes: need {"classes": [names], "templates": ["a photo of a {}"]} of strings,'
            f" not empty, in {path}"
        )
    return ClassSet(*map(tuple, zip(*pairs, strict=True)), templates=tuple(templates))


def classes_from_captions(captions: Iterable[Mapping[str, str]], language: str) -> ClassSet:
    """Each distinct caption of `language` is a class: the labelled set a captioned one implies."""
    names = dict.fromkeys(canonicalize(c[language]) for c in captions if language in c)
    if not names:
        raise DataError(f"eval.classes: no caption in language {language!r}")
    return ClassSet(tuple(names), tuple(names))


def targets(
    classes: ClassSet, captions: Sequence[Mapping[str, str]], groups: Sequence[str]
) -> Tensor:  # (N,) int64; -1 where the image is of no class
    """Class of each image: its group or one of its captions is the class's label or name."""
    index = {canonicalize(name): i for i, name in enumerate(classes.names)}
    index |= {canonicalize(label): i for i, label in enumerate(classes.labels)}
    found = []
    for group, caption in zip(groups, captions, strict=True):
        words = (canonicalize(word) for word in (group, *caption.values()))
        found.append(next((index[word] for word in words if word in index), -1))
    return torch.tensor(found)
