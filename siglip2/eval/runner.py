"""Evaluation on named sources: retrieval by subset and language, and zero-shot classification.

Sources are reported apart, so held-out concepts, styles and languages are sources of their own. The
mean over languages counts those that cover at least half as many images as the best covered one
(and leaves out, say, 200 languages that only name flags); the others are reported with `in_mean`
false. In a distributed run rank 0 calls `evaluate` and the other ranks wait.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siglip2.config import EvalConfig
from siglip2.errors import DataError
from siglip2.eval.embed import (
    EmbeddedImages,
    TextTable,
    embed_images,
    embed_texts,
    inference,
    same_picture,
    text_groups,
)
from siglip2.eval.retrieval import check_finite, retrieval_recall
from siglip2.eval.zero_shot import (
    ClassSet,
    Tokenizer,
    classes_from_captions,
    classify,
    read_classes,
    targets,
    top_k_accuracy,
    zero_shot_classifier,
)
from siglip2.files import write_atomic
from siglip2.models.siglip2 import Siglip2

if TYPE_CHECKING:
    from siglip2.eval.locca import LocCaResult

KS = (1, 5, 10)
ALL = "all"  # name of a source's only, unnamed subset
MIN_COVERAGE = 0.5  # of the best covered language's images, for a language to count in the mean
CAPTIONS_PREFIX = "captions:"  # eval.classes "captions:en": the captions are the classes


@dataclass(frozen=True)
class EvalResult:
    """`sources[name][subset]` holds languages[tag], mean, num_images, and zero_shot if asked for.

    num_images is the best covered language's. `budgets` has a row for each number of patches asked
    for, source and subset: the same means at that budget.
    """

    sources: dict[str, dict[str, dict[str, Any]]]
    num_parameters: int
    device: str
    budgets: list[dict[str, Any]] = field(default_factory=list)
    locca: dict[str, "LocCaResult"] = field(default_factory=dict)
    dense: dict[str, dict[str, float | int]] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat scalars: `val/<source>/<subset>/<language or mean>/i2t_r1`, `.../zero_shot/top1`."""
        flat = {}
        for source, subsets in self.sources.items():
            for subset, found in subsets.items():
                prefix = f"val/{source}/{subset}"
                tables = {**found["languages"], "mean": found["mean"]}
                if "zero_shot" in found:
                    tables["zero_shot"] = found["zero_shot"]
                for table, values in tables.items():
                    flat |= {
                        f"{prefix}/{table}/{k}": v for k, v in values.items() if type(v) is float
                    }
        for row in self.budgets:
            prefix = f"val/{row['source']}/{row['subset']}/at_{row['budget']}"
            flat |= {f"{prefix}/{k}": v for k, v in row["mean"].items() if type(v) is float}
        for source, found in self.locca.items():
            flat |= {f"val/{source}/locca/{k}": v for k, v in found.metrics().items()}
        for source, found in self.dense.items():
            flat |= {f"val/{source}/dense/{k}": v for k, v in found.items() if type(v) is float}
        return flat

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_parameters": self.num_parameters,
            "device": self.device,
            "sources": self.sources,
            "budgets": self.budgets,
            "locca": {source: found.to_dict() for source, found in self.locca.items()},
            "dense": self.dense,
            "metrics": self.metrics(),
        }

    def write_json(self, path: str | Path) -> Path:
        """Write everything as JSON; a reader sees the old file or the new one, never half."""
        path = Path(path)
        write_atomic(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        return path


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _retrieval(
    found: EmbeddedImages, texts: TextTable, first: list[int], language: str, *, chunk_size: int
) -> dict[str, float | int]:
    """Recalls among the distinct images with a caption in `language` and its distinct captions."""
    captioned = (first[i] for i, caption in enumerate(found.captions) if language in caption)
    rows = list(dict.fromkeys(captioned))
    table = text_groups(found.captions, found.groups, language)
    recall = retrieval_recall(
        found.img[torch.tensor(rows, device=found.img.device)],
        texts.rows(table),
        [found.groups[i] for i in rows],
        list(table.values()),
        ks=KS,
        chunk_size=chunk_size,
    )
    out: dict[str, float | int] = {
        "num_images": recall.num_images,
        "num_texts": recall.num_texts,
    }
    for k in KS:
        out[f"i2t_r{k}"], out[f"t2i_r{k}"] = recall.i2t[k], recall.t2i[k]
        out[f"chance_i2t_r{k}"], out[f"chance_t2i_r{k}"] = (
            recall.chance_i2t[k],
            recall.chance_t2i[k],
        )
    return out


def _subset(found: EmbeddedImages, texts: TextTable, *, chunk_size: int) -> dict[str, Any]:
    check_finite(found.img, "image")
    first = same_picture(found.img, found.groups)
    by_name = {
        language: _retrieval(found, texts, first, language, chunk_size=chunk_size)
        for language in sorted({language for caption in found.captions for language in caption})
    }
    languages = dict(sorted(by_name.items(), key=lambda item: -item[1]["num_images"]))
    most = max(values["num_images"] for values in languages.values())
    for values in languages.values():
        values["in_mean"] = values["num_images"] >= MIN_COVERAGE * most
    counted = [values for values in languages.values() if values["in_mean"]]
    names = [name for name, value in counted[0].items() if type(value) is float]
    mean = {name: sum(values[name] for values in counted) / len(counted) for name in names}
    return {
        "num_images": most,
        "languages": languages,
        "mean": {**mean, "num_languages": len(counted)},
    }


def _select(found: EmbeddedImages, subset: str) -> EmbeddedImages:
    rows = [i for i, name in enumerate(found.subsets) if name == subset]
    img = found.img[torch.tensor(rows, device=found.img.device)]
    lists = ([values[i] for i in rows] for values in found[1:5])
    return EmbeddedImages(img, *lists, found.num_patches)


def _zero_shot(
    model: Siglip2,
    found: EmbeddedImages,
    classes: ClassSet,
    classifier: Tensor,  # (D, C)
    config: EvalConfig,
) -> dict[str, float | int] | None:
    """Accuracy over the images of a class, and the mean probability of the right one.

    None when there is none.
    """
    target = targets(classes, found.captions, found.groups).to(model.device)
    known = target >= 0
    num_images = int(known.sum())
    if not num_images:
        return None
    img, right = found.img[known], target[known]
    top = top_k_accuracy(img, classifier, right, chunk_size=config.chunk_size)
    scores = [
        classify(part, classifier, model.log_scale, model.bias, activation=config.activation)
        .gather(1, of_part[:, None])
        .sum()
        for part, of_part in zip(
            img.split(config.chunk_size), right.split(config.chunk_size), strict=True
        )
    ]
    return {
        "num_images": num_images,
        "num_without_class": len(target) - num_images,
        "num_classes": len(classes.names),
        **{f"top{k}": value for k, value in top.items()},
        f"{config.activation}_probability": float(sum(scores)) / num_images,
        **{f"chance_top{k}": min(1.0, k / len(classes.names)) for k in top},
    }


def _class_set(spec: str, found: EmbeddedImages) -> ClassSet:
    if spec.startswith(CAPTIONS_PREFIX):
        return classes_from_captions(found.captions, spec.removeprefix(CAPTIONS_PREFIX))
    return read_classes(spec)


def _source(
    model: Siglip2,
    name: str,
    found: EmbeddedImages,
    tokenizer: Tokenizer,
    config: EvalConfig,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(subset, its results) of an embedded source."""
    texts = embed_texts(model, found.captions, tokenizer, batch_size=config.batch_size)
    if not len(texts.txt):
        raise DataError(f"evaluation source {name!r} has no caption")
    if config.classes is not None:
        classes = _class_set(config.classes, found)
        classifier = zero_shot_classifier(
            model, classes.names, classes.templates, tokenizer, batch_size=config.batch_size
        )
    for subset in dict.fromkeys(found.subsets):
        part = _select(found, subset)
        out = _subset(part, texts, chunk_size=config.chunk_size)
        if config.classes is not None:
            scores = _zero_shot(model, part, classes, classifier, config)
            if scores is not None:
                out["zero_shot"] = scores
        yield subset or ALL, out


def evaluate(
    model: Siglip2,
    sources: Mapping[str, Any],
    transform: Any,
    tokenizer: Tokenizer,
    config: EvalConfig,
    *,
    seen_budgets: Sequence[int] = (),
    progress: Callable[[str], None] | None = None,
) -> EvalResult:
    """Retrieval, and zero-shot classification where `config.classes` is set, on each named source.

    Args:
        sources: Name -> source, as `siglip2.data.open_source` returns it.
        config: `classes` is a JSON file (`read_classes`), or "captions:en" to take the captions of
            a language as the classes. An image of none of the classes is left out and counted in
            `num_without_class`. At each of its `budgets` everything is evaluated again.
        seen_budgets: Numbers of patches the model was trained at, marked in the rows of `budgets`.
        progress: Called with a short sentence now and then.

    The model is put in evaluation mode and back. Raises DataError for a source without images or
    captions and ValueError when embeddings are not finite.
    """
    if config.budgets and not hasattr(transform, "at"):
        raise DataError("eval.budgets are for NaFlex models; this one has a fixed resolution")
    say = progress or (lambda text: None)
    results, rows = {}, []
    with inference(model):
        for name, source in sources.items():
            found = _embedded(model, name, source, transform, config, say)
            results[name] = dict(_source(model, name, found, tokenizer, config))
            for budget in config.budgets:
                at = f"{name} at {budget} patches"
                found = _embedded(model, at, source, transform.at(budget), config, say)
                of_budget = {"source": name, "budget": budget, "seen": budget in seen_budgets}
                rows += [
                    {**of_budget, "subset": subset, "num_patches": found.num_patches, **out}
                    for subset, out in _source(model, name, found, tokenizer, config)
                ]
    for row in rows:
        del row["languages"]
    num_parameters = sum(p.numel() for p in model.parameters())
    return EvalResult(results, num_parameters, device_name(model.device), rows)


def _embedded(
    model: Siglip2,
    name: str,
    source: Any,
    transform: Any,
    config: EvalConfig,
    say: Callable[[str], None],
) -> EmbeddedImages:
    from siglip2.data import EvalLoader

    loader = EvalLoader(
        source, transform, batch_size=config.batch_size, max_images=config.max_images
    )
    found = embed_images(model, loader, progress=lambda n: say(f"evaluating {name}: {n} images"))
    if not found.keys:
        raise DataError(f"evaluation source {name!r} has no image that can be read")
    return found
