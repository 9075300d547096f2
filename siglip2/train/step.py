"""One optimisation step: forward, backward, clip, update. No I/O, no logging."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NonFiniteLossError
from .accumulate import accumulate, run_passes
from .fused_adamw import FusedAdamW
from .parallel import unwrapped
from .ssl_stage import update_teacher
from .task import Siglip2Task


class TrainStep:
    """`step(batch) -> metrics`, 0-D tensors on the device; nothing waits for it.

    A step whose loss or gradient norm is not finite leaves the weights as they were (fused AdamW's
    `found_inf`), is reported by name, and its batch is saved; on an accelerator that is noticed one
    step later, so that no step waits.

    Args:
        task: `batch -> (losses with "loss", report)`; may be wrapped in DDP or FSDP2.
        optimizer: a fused AdamW from `adamw`, or any optimizer (then a non-finite step costs one
            wait).
        schedule: share of the peak learning rate as a function of examples seen.
        grad_clip_norm: global norm; 0 turns clipping off.
        accum_steps: parts each batch is computed in: the activations of one part, the loss over
            all pairs of the batch (see `siglip2.train.accumulate`). `task` is a `Siglip2Task`
            then. A batch may ask for more of them under the key "accum_steps".
        on_nonfinite: "raise" NonFiniteLossError, or "skip" the step and count it in `num_skipped`.
        debug_dir: where the batch of a non-finite step is saved.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Callable[[float], float] = lambda examples: 1.0,
        grad_clip_norm: float = 1.0,
        accum_steps: int = 1,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        debug_dir: str | os.PathLike | None = None,
    ):
        self.task = task
        self.optimizer = optimizer
        self.schedule = schedule
        self.grad_clip_norm = grad_clip_norm
        self.accum_steps = accum_steps
        self.on_nonfinite = on_nonfinite
        self.debug_dir = None if debug_dir is None else Path(debug_dir)
        self.num_steps = 0
        self.num_skipped = 0
        self._can_skip = all(g.get("fused") for g in optimizer.param_groups)
        self._pending: tuple[int, Tensor, dict[str, Tensor], Mapping[str, Any]] | None = None

    def __call__(self, batch: Mapping[str, Any], *, examples: float = 0.0) -> dict[str, Tensor]:
        """Train on `batch`.

        `examples` is how many were seen before it, which sets the learning rate.
        """
        lr = self._set_lr(examples)
        losses, report = self._backward(batch)
        norm = self._grad_norm()
        bad = ~torch.isfinite(norm) | ~torch.isfinite(losses["loss"].detach())
        if dist.is_initialized() and dist.get_world_size() > 1:
            votes = bad.float()  # every rank must take the same decision
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            bad = votes > 0
        self.check()
        losses = {name: value.detach() for name, value in losses.items()}
        self._pending = (self.num_steps, bad, {**losses, "grad_norm": norm}, batch)
        self._update(bad, examples)
        self.num_steps += 1
        if bad.device.type == "cpu":
            self.check()
        return {**losses, **report, "grad_norm": norm, "lr": torch.tensor(lr)}

    def check(self) -> None:
        """Look at the previous step's verdict.

        Raises NonFiniteLossError when it was not finite.
        """
        if self._pending is None:
            return
        (step, bad, values, batch), self._pending = self._pending, None
        if not bool(bad):
            return
        self.num_skipped += 1
        if self.on_nonfinite == "skip":
            return
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLossError(_explain(step, values, self._save(step, batch)))

    def _backward(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parts = max(self.accum_steps, batch.get("accum_steps", 1))
        if parts > 1:
            return accumulate(self.task, batch, parts)
        if isinstance(unwrapped(self.task), Siglip2Task):
            return run_passes(self.task, batch)
        losses, report = self.task(batch)
        losses["loss"].backward()
        return losses, report

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    def _set_lr(self, examples: float) -> float:
        share = self.schedule(examples)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
        return self.optimizer.param_groups[0]["lr"]

    def _grad_norm(self) -> Tensor:
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.grad_clip_norm:
            self._clip(norm)
        return norm

    def _clip(self, norm: Tensor) -> None:
        """In the update's own pass where the optimizer offers that (`FusedAdamW`)."""
        if hasattr(self.optimizer, "clip_coefficient"):
            self.optimizer.clip_coefficient = (self.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        else:
            nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip_norm, norm)

    def _update(self, bad: Tensor, examples: float) -> None:
        task = unwrapped(self.task)
        stage = task.ssl if isinstance(task, Siglip2Task) else None
        momentum = None if stage is None else stage.momentum(examples)
        if momentum is not None and isinstance(self.optimizer, FusedAdamW):
            self.optimizer.momentum = momentum
        if self._can_skip:
            self.optimizer.found_inf = bad.float()
            self.optimizer.step()
        elif not bool(bad):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stage is not None:
            update_teacher(
                stage,
                task.model.vision,
                self.optimizer,
                momentum=momentum,
                found_inf=bad.float(),
            )

    def _save(self, step: int, batch: Mapping[str, Any]) -> Path | None:
        if self.debug_dir is None:
            return None
        self.debug_dir.mkdir(parents=True, exist_ok=True)
        path = self.debug_dir / f"step_{step:09d}.pt"
        torch.save(dict(batch), path)
        return path


def _explain(step: int, values: Mapping[str, Tensor], path: Path | None) -> str:
    shown = ", ".join(f"{name}={float(value):.4g}" for name, value in values.items())
    culprits = [
        name
        for name, value in values.items()
        if name not in ("loss", "grad_norm") and not bool(torch.isfinite(value))
    ]
    where = f"objective {', '.join(culprits)}" if culprits else "the gradient"
    saved = f"; its batch is in {path}" if path else ""
    return (
        f"step {step}: {where} is not finite ({shown}); the weights are those before it{saved}."
        " Lower optim.lr, look at the batch, or set train.on_nonfinite=skip"
    )
