"""Which implementation of an op runs: the fastest that takes the input, or the one asked for."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["reference", "chunked", "cublas", "triton", "cuda"]

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = find_spec("triton") is not None
_DEFAULT_ON_CPU = ("chunked", "torch", "reference")


def has_triton() -> bool:
    """Whether the package is installed; it is imported on first use only."""
    return _HAS_TRITON


def no_triton(x: Tensor) -> str | None:
    """Why no Triton kernel can take `x`, whatever its shape; None when one may."""
    if not _HAS_TRITON:
        return "needs the package 'triton' (pip install triton)"
    if x.device.type == "cuda" and not INTERPRET:
        return None
    if x.device.type != "cpu" or not INTERPRET:
        return f"needs a CUDA tensor, got {x.device} (TRITON_INTERPRET=1 runs CPU tensors, slowly)"
    if x.dtype is torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16"
    return None


def choose(asked: str | None, unsupported: Mapping[str, str | None], device: torch.device) -> str:
    """Name of the backend that runs.

    Args:
        asked: A name, which never falls back; None for the fastest that takes the input.
        unsupported: Each backend of the op, fastest first, to its reason for not taking the
            input; None means it can.
        device: Where the input lives; on the CPU None means "chunked", else "torch" where the
            library's own is as good, else "reference".

    Raises:
        ValueError: The op has no backend of that name.
        NotImplementedError: The asked-for backend, or every one, does not take the input.
    """
    if asked is not None:
        if asked not in unsupported:
            names = ", ".join(repr(name) for name in unsupported)
            raise ValueError(f"need backend None or one of {names}; got {asked!r}")
        if unsupported[asked] is not None:
            raise NotImplementedError(f"backend {asked!r}: {unsupported[asked]}")
        return asked
    order = _DEFAULT_ON_CPU if device.type == "cpu" else tuple(unsupported)
    for name in order:
        if unsupported.get(name, "no such backend") is None:
            return name
    reasons = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items())
    raise NotImplementedError(f"no backend takes this input: {reasons}")


class Choice(NamedTuple):
    """What `backend=None` runs for one op on one device, and why nothing faster does."""

    op: str
    backend: str
    passed_over: Mapping[str, str]  # faster backends -> reason

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.op}: {self.backend}" + (f" ({reasons})" if reasons else "")


def explain(op: str, unsupported: Mapping[str, str | None], device: torch.device) -> Choice:
    """The choice of `backend=None`, with the reason of each backend listed before it."""
    backend = choose(None, unsupported, device)
    names = list(unsupported)
    faster = names[: names.index(backend)]
    default = f"not the default on {device.type}"
    return Choice(op, backend, {name: unsupported[name] or default for name in faster})
