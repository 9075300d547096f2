"""What one benchmark is: inputs, rival implementations, and the work they cannot avoid."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["forward", "backward", "full"]
MODES: tuple[Mode, ...] = ("forward", "backward", "full")
Shape = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of one call. Roofline time is max(flops / peak, num_bytes / bandwidth)."""

    flops: float
    num_bytes: float  # inputs read once, outputs written once


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One implementation. `build` imports and compiles: nothing is loaded before it is asked for.

    `build` and the function it returns may raise NotImplementedError: the rival is then skipped
    with that reason.
    """

    build: Callable[[], Callable[..., Tensor]]
    module: str | None = None  # import name of the package it comes from
    pip: str | None = None  # what to install for it
    needs_cuda: bool = False
    is_ours: bool = False

    def unsupported(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.pip or self.module})"
        if self.needs_cuda and device != "cuda":
            return "needs a CUDA device"
        return None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op. Every rival takes what `make` returns and computes what `reference` does."""

    x_name: str  # the dimension tables and plots run along
    x_label: str
    shapes: Sequence[Shape]  # the first is the smoke shape; the others are measured on a GPU
    check_shapes: Mapping[str, Shape]  # device -> shape at which values and gradients are checked
    make: Callable[..., Sequence[Any]]  # (**shape, dtype, device, generator) -> inputs
    reference: Callable[..., Tensor]  # the specification, run in float64 for the check
    rivals: Mapping[str, Rival]  # the first is the baseline of speed-ups and of the error bound
    cost: Callable[..., Mapping[str, Cost]]  # (**shape, dtype) -> mode -> Cost
    dtypes: Sequence[torch.dtype] = field(default=(torch.bfloat16,))  # measured on a GPU

    @property
    def baseline(self) -> str:
        return next(iter(self.rivals))


def make_inputs(case: Case, shape: Shape, *, dtype: torch.dtype, device: str) -> list[Any]:
    """The case's inputs from a fixed seed."""
    generator = torch.Generator(device=device).manual_seed(0)
    return list(case.make(**shape, dtype=dtype, device=device, generator=generator))


def differentiable(inputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]


def upstream(out: Tensor) -> Tensor | None:
    """The gradient sent into an op's backward: None (1) for a scalar, else fixed random values."""
    if out.ndim == 0:
        return None
    generator = torch.Generator(device=out.device).manual_seed(1)
    return torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(
        out.dtype
    )
