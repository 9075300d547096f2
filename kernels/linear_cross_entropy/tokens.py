"""Chunks of tokens: how much of the (tokens, vocabulary) matrix exists at a time."""

from collections.abc import Iterator

# Whole tiles of every backend.
_MULTIPLE = 128


def token_chunks(
    T: int, V: int, chunk_tokens: int | None, *, max_elements: int, min_tokens: int
) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of about equal length over T tokens.

    Args:
        chunk_tokens: Most tokens of a chunk; None: as many as `max_elements` logits allow.
        min_tokens: What None does not go below, however large the vocabulary: each chunk reads and
            writes the whole float32 gradient of the weight, which short chunks would wait for.
    """
    if chunk_tokens is None:
        chunk_tokens = max(max_elements // V // _MULTIPLE * _MULTIPLE, min_tokens)
    num = -(-T // chunk_tokens)
    if num == 0:
        return
    even = -(-T // num)
    step = min(-(-even // _MULTIPLE) * _MULTIPLE, chunk_tokens)
    for start in range(0, T, step):
        yield start, min(start + step, T)
