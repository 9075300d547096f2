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

# Of errors, in units of bench/check.py.
MAX_ERROR = 2.0
APPROXIMATE = 1000.0  # for a rival that is used although it rounds more than eager PyTorch


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of one call. Roofline time is max(flops / peak, num_bytes / bandwidth)."""

    flops: float
    num_bytes: float  # inputs read once, outputs written once


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One implementation. `build` imports and compiles: nothing is loaded before it is asked for.

    `build` and the function it returns may raise NotImplementedError: the rival is then skipped
    with that reason.  `min_bytes` is a lower bound of the memory it takes beyond the inputs; where
    the device has less, it is skipped before it runs.
    """

    build: Callable[[], Callable[..., Tensor]]
    module: str | None = None  # import name of the package it comes from
    pip: str | None = None  # what to install for it
    needs_cuda: bool = False
    is_ours: bool = False
    reference: Callable[..., Tensor] | None = None  # where it computes other than the case's
    min_bytes: Callable[..., float] | None = None  # (mode, **shape, dtype) -> bytes
    max_error: float = MAX_ERROR  # above it, the rival is wrong and not timed
    # (mode, **shape) -> bytes of float32 sums that it keeps beside gradients of fewer bits
    accumulator_bytes: Callable[..., float] = lambda mode, **shape: 0.0

    def unsupported(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.pip or self.module})"
        if self.needs_cuda and device != "cuda":
            return "needs a CUDA device"
        return None

    def too_large(
        self, mode: Mode, shape: Shape, dtype: torch.dtype, available_bytes: int
    ) -> str | None:
        """Why the device's memory cannot hold it at this shape, or None."""
        if self.min_bytes is None:
            return None
        needed = self.min_bytes(mode, **shape, dtype=dtype)
        if needed <= available_bytes:
            return None
        need_gib, have_gib = needed / 2**30, available_bytes / 2**30
        return f"needs {need_gib:,.0f} GiB or more; the device has {have_gib:,.0f}"


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
    modes: Sequence[Mode] = ("forward", "full")  # measured where nobody asks for others
    # Label -> arguments of `make` at which rivals are checked; the labels head columns of errors.
    regimes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})

    @property
    def baseline(self) -> str:
        return next(iter(self.rivals))


def make_inputs(
    case: Case, shape: Shape, *, dtype: torch.dtype, device: str, **regime: Any
) -> list[Any]:
    """The case's inputs from a fixed seed."""
    generator = torch.Generator(device=device).manual_seed(0)
    return list(case.make(**shape, dtype=dtype, device=device, generator=generator, **regime))


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
