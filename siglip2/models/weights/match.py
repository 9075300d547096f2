"""Do a file's tensors fit the model? If not: which are missing, unexpected or of another shape."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ...errors import CheckpointError

SHOWN = 10  # names listed of each kind


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str) -> None:
    """Raise CheckpointError unless names and shapes are exactly those of `expected`.

    A scalar may be stored as () or (1,).
    """
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    reshaped = [
        f"{name}: need {tuple(x.shape)}, got {tuple(tensors[name].shape)}"
        for name, x in expected.items()
        if name in tensors and not _same_shape(x, tensors[name])
    ]
    if not (missing or unexpected or reshaped):
        return
    parts = [f"{what} does not fit the model"]
    if missing:
        names = [_with_nearest(name, unexpected) for name in missing[:SHOWN]]
        parts.append(_listing("missing", names, len(missing)))
    if unexpected:
        parts.append(_listing("unexpected", unexpected[:SHOWN], len(unexpected)))
    if reshaped:
        parts.append(_listing("of another shape", reshaped[:SHOWN], len(reshaped)))
    raise CheckpointError("\n".join(parts))


def require_tensor(tensors: Mapping[str, Tensor], name: str, *, what: str) -> Tensor:
    """The tensor the architecture is read from."""
    if name not in tensors:
        raise CheckpointError(f"{what} lacks {_with_nearest(name, tensors)}")
    return tensors[name]


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape or (a.numel() == b.numel() == 1)


def _with_nearest(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
    return f"{name} (nearest in the file: {near[0]})" if near else name


def _listing(kind: str, names: Sequence[str], total: int) -> str:
    more = f"\n    ... and {total - len(names)} more" if total > len(names) else ""
    return f"  {kind} ({total}):" + "".join(f"\n    {name}" for name in names) + more
