"""Row ranges that bound how much of a (rows, columns) matrix exists at a time."""

from collections.abc import Iterator


def row_chunks(
    rows: int, columns: int, max_elements: int, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges over `rows`, each of at most `max_elements` matrix elements.

    Every range but the last has a row count divisible by `multiple`, which is also the least.
    """
    step = max(max_elements // max(columns, 1) // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
