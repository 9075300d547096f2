"""AdamW whose one pass also scales and clips gradients, averages a teacher and writes copies."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip2_kernels.fused_adamw import average, fused_adamw


class Followers(NamedTuple):
    """What is written of one parameter beyond itself."""

    teacher: Tensor | None = None  # float32
    copy: Tensor | None = None  # bfloat16 or float16
    teacher_copy: Tensor | None = None  # the same dtype


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with `fused=True`, by `siglip2_kernels.fused_adamw`.

    State dicts are torch's: a run may load those of any torch.optim.AdamW and the other way round.
    State is made at once. `grad_scale` and `found_inf` are honoured as torch's fused AdamW does;
    where `found_inf` is 1 teachers stay as well. Shards of FSDP2 are updated where they lie.

    Attributes:
        clip_coefficient: What the next step multiplies gradients with, a tensor on their device;
            that step forgets it.
        momentum: Of all teachers, from the next step on. A tensor should be float64: 1 - momentum
            is what counts.

    Args:
        lr, weight_decay: Numbers, or tensors of one element that a schedule writes into; those
            work in a captured CUDA graph, where a number stays what it was at the capture.
        capturable: Allows capture in a CUDA graph; costs nothing.
        backend: See `siglip2_kernels.fused_adamw`; None: Triton on a GPU, torch on the CPU.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        *,
        capturable: bool = False,
        backend: str | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, capturable=capturable, fused=True)
        self.backend = backend

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for `amsgrad` and `maximize`, which are not offered."""
        self._set_defaults()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        for p in group["params"]:
            if p.requires_grad:
                self._state(p)

    def attach(
        self,
        parameter: Tensor,
        *,
        teacher: Tensor | None = None,
        copy: Tensor | None = None,
        teacher_copy: Tensor | None = None,
    ) -> None:
        """Keep these up to date with `parameter`, like it in shape and sharding.

        Copies are written now; the teacher is left as it is. What was attached before is replaced.

        Raises:
            ValueError: `parameter` is not of this optimizer, or `teacher_copy` has no teacher.
        """
        if not any(parameter is p for g in self.param_groups for p in g["params"]):
            shape = tuple(parameter.shape)
            raise ValueError(f"need a parameter of this optimizer; got one of shape {shape}")
        if teacher_copy is not None and teacher is None:
            raise ValueError("need a teacher with teacher_copy; got None")
        self._followers[parameter] = followers = Followers(teacher, copy, teacher_copy)
        with torch.no_grad():
            _write_copies(parameter, followers)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; teachers of the others follow too.

        Raises RuntimeError in the capture of a CUDA graph without `capturable`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["capturable"] and _is_capturing():
                raise RuntimeError(
                    "need capturable=True in a CUDA graph; got False. Make FusedAdamW with it, and"
                    " with learning rates as tensors, which a schedule can change between replays"
                )
            self._update(group)
            self._follow_without_gradient(group)
        self.clip_coefficient = None
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p) for p in params]
        followers = [self._followers.get(p, Followers()) for p in params]
        fused_adamw(
            _locals(params),
            _locals(p.grad for p in params),
            _locals(s["exp_avg"] for s in states),
            _locals(s["exp_avg_sq"] for s in states),
            [s["step"] for s in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip_coefficient=self.clip_coefficient,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            teachers=_locals(f.teacher for f in followers),
            momentum=self.momentum,
            copies=_locals(f.copy for f in followers),
            teacher_copies=_locals(f.teacher_copy for f in followers),
            backend=self.backend,
        )

    def _follow_without_gradient(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            followers = self._followers.get(p)
            if p.grad is None and followers is not None and followers.teacher is not None:
                found_inf = getattr(self, "found_inf", None)
                pair = [_local(followers.teacher)], [_local(p)]
                average(*pair, momentum=self.momentum, found_inf=found_inf)
                _write_copies(p, followers)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Under torch's names and in its layout."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _set_defaults(self) -> None:
        """What neither a state dict nor a pickle holds."""
        for name, value in (("clip_coefficient", None), ("momentum", None), ("backend", None)):
            self.__dict__.setdefault(name, value)
        self.__dict__.setdefault("_followers", {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_defaults()
        for group in self.param_groups:
            _check(group)
            # Of whoever wrote them, as where it kept its steps
            group.update(fused=True, foreach=None, capturable=self.defaults["capturable"])
            for p in group["params"]:
                if self.state.get(p):
                    step = self.state[p]["step"]
                    self.state[p]["step"] = step.to(p.device, torch.float32)


def _check(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"need {name}=False: FusedAdamW has no such form; got True")


def _write_copies(p: Tensor, followers: Followers) -> None:
    if followers.copy is not None:
        _local(followers.copy).copy_(_local(p))
    if followers.teacher_copy is not None:
        _local(followers.teacher_copy).copy_(_local(followers.teacher))


def _local(x: Tensor | None) -> Tensor | None:
    """This rank's shard of a DTensor; other tensors are whole."""
    return x.to_local() if hasattr(x, "to_local") else x


def _locals(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [_local(x) for x in tensors]


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
