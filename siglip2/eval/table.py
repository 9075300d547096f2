"""Evaluation results as a plain table."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from siglip2.eval.dense_report import dense_rows
from siglip2.eval.runner import EvalResult

if TYPE_CHECKING:
    from siglip2.eval.locca import LocCaResult

_COLUMNS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "chance_i2t_r1")
_HEADS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "chance R@1")

CAPTION_BASELINES = {"commonest": "unigram", "by place": "by_place"}  # head -> name in results
_GROUNDING = (
    ("refer", "Acc@0.5", "accuracy", "constant_accuracy"),
    ("refer", "mean overlap", "mean_iou", "constant_mean_iou"),
    ("refer", "are boxes", "are_boxes", None),
    ("ground", "exact", "exact", "constant_exact"),
    ("ground", "in any language", "exact_any", "constant_exact_any"),
)


def _rows(result: EvalResult, language: str | None, max_languages: int) -> list[tuple[str, ...]]:
    rows = [("source", "subset", "language", "images", *_HEADS)]
    for source, subsets in result.sources.items():
        for subset, found in subsets.items():
            mean = found["mean"]
            lines = [(f"mean of {mean['num_languages']}", found["num_images"], mean)]
            languages = found["languages"]
            shown = {x: v for x, v in languages.items() if v["in_mean"]}
            if language is not None:
                shown = {x: v for x, v in languages.items() if x == language}
            lines += [(x, v["num_images"], v) for x, v in list(shown.items())[:max_languages]]
            for tag, num_images, values in lines:
                numbers = (f"{100 * values[column]:.1f}" for column in _COLUMNS)
                rows.append((source, subset, tag, str(num_images), *numbers))
            hidden = len(languages) - (len(lines) - 1)
            if hidden and language is None:
                rows.append((source, subset, f"({hidden} more)", *[""] * 8))
    return rows


def format_table(
    result: EvalResult, *, language: str | None = None, max_languages: int = 20
) -> str:
    """Recalls in percent, a line for each source, subset and language; then zero-shot accuracies.

    Then, where it was evaluated, what a captioning decoder says and what dense features know.

    `language` shows only that one beside the mean; else the languages that count in it, at most
    `max_languages`.
    """
    rows = _rows(result, language, max_languages)
    lines = _aligned(rows, num_words=3)
    for source, subsets in result.sources.items():
        for subset, found in subsets.items():
            if "zero_shot" in found:
                z = found["zero_shot"]
                lines.append(
                    f"zero-shot {source} {subset}: top-1 {100 * z['top1']:.1f},"
                    f" top-5 {100 * z['top5']:.1f} of {z['num_images']} images,"
                    f" {z['num_classes']} classes"
                )
    lines += _budget_lines(result)
    if result.locca:
        options = {"language": language, "max_languages": max_languages}
        lines += ["", format_locca_table(result.locca, **options)]
    if result.dense:
        lines += ["", "Dense features: linear probe on patches, k-NN on embeddings, in percent:"]
        lines += _aligned(dense_rows(result.dense), num_words=1)
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]], *, num_words: int) -> list[str]:
    """Columns as lines: the first `num_words` to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _budget_lines(result: EvalResult) -> list[str]:
    """A line for each budget, source and subset."""
    if not result.budgets:
        return []
    head = ("patches", "trained", "mean", "source", "subset", "i2t R@1", "t2i R@1", "chance R@1")
    rows = [head]
    for row in result.budgets:
        mean = row["mean"]
        recalls = (mean[name] for name in ("i2t_r1", "t2i_r1", "chance_i2t_r1"))
        rows.append(
            (
                str(row["budget"]),
                "yes" if row["seen"] else "no",
                f"{row['num_patches']:.1f}",
                row["source"],
                row["subset"],
                *(f"{100 * value:.1f}" for value in recalls),
            )
        )
    return ["", "At each number of patches an image may have:", *_aligned(rows, num_words=0)]


def format_locca_table(
    results: Mapping[str, "LocCaResult"], *, language: str | None = None, max_languages: int = 20
) -> str:
    """What a captioning decoder says of each source, in percent, beside blind guesses.

    `language` and `max_languages` as for `format_table`.
    """
    taken = next(iter(results.values())).captions["baseline"]
    lines = [f"Caption tokens, and always the commonest of the {taken} captions, in percent:"]
    lines += _aligned(_caption_rows(results, language, max_languages), num_words=2)
    grounding = _grounding_rows(results)
    if len(grounding) > 1:
        lines += ["", "Boxes of phrases (refer), phrases of boxes (ground):"]
        lines += _aligned(grounding, num_words=3)
    return "\n".join(lines)


def _caption_rows(
    results: Mapping[str, "LocCaResult"], language: str | None, max_languages: int
) -> list[tuple[str, ...]]:
    rows = [("source", "language", "captions", "tokens", "loss", "right", *CAPTION_BASELINES)]
    for source, result in results.items():
        mean, languages = result.captions["mean"], result.captions["languages"]
        shown = [x for x, v in languages.items() if v["in_mean"]][:max_languages]
        shown = shown if language is None else [x for x in languages if x == language]
        lines = [(x, languages[x]) for x in shown]
        if mean["num_languages"]:
            lines.insert(0, (f"mean of {mean['num_languages']}", mean))
        for tag, values in lines:
            counts = (str(values.get(name, "")) for name in ("num_texts", "num_tokens"))
            shares = (values[name] for name in ("accuracy", *CAPTION_BASELINES.values()))
            numbers = (f"{100 * share:.1f}" for share in shares)
            rows.append((source, tag, *counts, f"{values['loss']:.3f}", *numbers))
    return rows


def _grounding_rows(results: Mapping[str, "LocCaResult"]) -> list[tuple[str, ...]]:
    rows = [("source", "task", "what", "regions", "percent", "one for all")]
    for source, result in results.items():
        for task, what, name, constant in _GROUNDING:
            if found := getattr(result, task):
                blind = "" if constant is None else f"{100 * found[constant]:.1f}"
                value = f"{100 * found[name]:.1f}"
                rows.append((source, task, what, str(found["num_regions"]), value, blind))
    return rows


def print_result(result: EvalResult, *, language: str | None = None) -> None:
    print(format_table(result, language=language))
