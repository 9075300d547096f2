"""Evaluation results as a plain table."""

from siglip2.eval.runner import EvalResult

_COLUMNS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "chance_i2t_r1")
_HEADS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "chance R@1")


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

    `language` shows only that one beside the mean; else the languages that count in it, at most
    `max_languages`.
    """
    rows = _rows(result, language, max_languages)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    for source, subsets in result.sources.items():
        for subset, found in subsets.items():
            if "zero_shot" in found:
                z = found["zero_shot"]
                lines.append(
                    f"zero-shot {source} {subset}: top-1 {100 * z['top1']:.1f},"
                    f" top-5 {100 * z['top5']:.1f} of {z['num_images']} images,"
                    f" {z['num_classes']} classes"
                )
    return "\n".join(lines + _budget_lines(result))


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return ["", "At each number of patches an image may have:", *aligned]


def print_result(result: EvalResult, *, language: str | None = None) -> None:
    print(format_table(result, language=language))
