"""A student's distributions over prototypes against its teacher's.

    p = softmax(h(teacher) / teacher_temp + bias),  q = softmax(h(student) / student_temp)
    loss = -sum_t weight_t sum_k p_k log q_k        with h = unit embedding times unit prototypes

The bias keeps the teacher from one answer for all: minus the moving mean of its logits over its
temperature (centring, DINO), or what three Sinkhorn-Knopp iterations find (DINOv2). Tokens times
prototypes are never held, nor are the logits that the mean is of: it is the mean embedding times
the prototypes.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip2_kernels import (
    mean_prototype_logits,
    prototype_cross_entropy,
    sinkhorn_bias,
)

from ..distributed import waiting_for
from .heads import HeadOutput

Balance = Literal["centring", "sinkhorn"]


class Targets(NamedTuple):
    """What a teacher says of a batch; no gradient."""

    z: Tensor  # (S, D)
    prototypes: Tensor  # (K, D) of any length
    bias: Tensor  # (K,)


class PrototypeLoss(nn.Module):
    """Base of both losses: the teacher's side, and its centre.

    Over ranks the centre and Sinkhorn's sums are those of all; a loss is this rank's, and with
    `num_images` = images of all ranks / ranks the mean over ranks is the loss of all.

    Args:
        prototypes: Of the head that comes with each call.
        balance: "centring" or "sinkhorn"; one "sinkhorn" call balances over its own rows alone.
        process_group: Ranks that share a batch; None means all.
        backend: See `siglip2_kernels.prototype_cross_entropy`.

    Raises ValueError for another balance or a temperature that is not positive.
    """

    def __init__(
        self,
        prototypes: int,
        *,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        balance: Balance = "centring",
        centre_momentum: float = 0.9,
        sinkhorn_iterations: int = 3,
        process_group: dist.ProcessGroup | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if balance not in ("centring", "sinkhorn"):
            raise ValueError(f"need balance 'centring' or 'sinkhorn'; got {balance!r}")
        if not (student_temp > 0 and teacher_temp > 0):
            got = f"{student_temp} and {teacher_temp}"
            raise ValueError(f"need temperatures above 0; got {got} (student, teacher)")
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.centre_momentum, self.sinkhorn_iterations = centre_momentum, sinkhorn_iterations
        self.process_group, self.backend = process_group, backend
        is_centred = balance == "centring"
        self.register_buffer("centre", torch.zeros(prototypes) if is_centred else None)
        # No buffer: DDP would give every rank the first one's between two parts of a batch.
        self._seen: Tensor | None = None  # (K+1,) sum of logits, number of rows

    @torch.no_grad()
    def targets(self, taught: HeadOutput) -> Targets:  # of S rows
        """The teacher's side, for one or more calls; in training mode the centre will move."""
        z, prototypes = taught
        if self.centre is None:
            bias = sinkhorn_bias(
                z,
                prototypes,
                teacher_temp=self.teacher_temp,
                iterations=self.sinkhorn_iterations,
                weight_norm=True,
                group=self._ranks(),
                backend=self.backend,
            )
            return Targets(z, prototypes, bias)
        if self.training:
            mean = mean_prototype_logits(z, prototypes, weight_norm=True)
            seen = torch.cat([len(z) * mean, mean.new_full((1,), len(z))])
            self._seen = seen if self._seen is None else self._seen + seen
        return Targets(z, prototypes, -self.centre / self.teacher_temp)

    def _ranks(self) -> dist.ProcessGroup | None:
        """None for one rank."""
        if not dist.is_initialized() or dist.get_world_size(self.process_group) == 1:
            return None
        return self.process_group or dist.group.WORLD

    @torch.no_grad()
    def update_centre(self, *, found_inf: Tensor | None = None) -> None:
        """Move the centre by all that was seen since the last call; after the optimiser step.

        Not where `found_inf`, 1 or 0 on the device, is 1; nobody waits to read it.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return
        group = self._ranks()
        if group is not None:
            with waiting_for("the teacher's mean logits", group):
                dist.all_reduce(seen, group=group)
        mean = seen[:-1] / seen[-1].clamp(min=1)
        moved = self.centre.lerp(mean.to(self.centre.dtype), 1 - self.centre_momentum)
        if found_inf is not None:
            moved = torch.where(found_inf > 0, self.centre, moved)
        self.centre.copy_(moved)

    def forget(self) -> None:
        """Drop what was seen since the last update, of a step that was skipped."""
        self._seen = None

    def _cross_entropy(
        self,
        student: HeadOutput,
        teacher: HeadOutput | Targets,
        index: Tensor | None,  # (T,) teacher's row of each student's
        weight: Tensor,  # (T,)
    ) -> Tensor:  # ()
        targets = teacher if isinstance(teacher, Targets) else self.targets(teacher)
        return prototype_cross_entropy(
            student.z,
            student.prototypes,
            targets.z,
            targets.prototypes,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
            teacher_bias=targets.bias,
            teacher_index=index,
            token_weight=weight,
            weight_norm=True,
            backend=self.backend,
        )


def _ones(z: Tensor) -> Tensor:  # (T, D) -> (T,) at least float32
    return z.new_ones(len(z), dtype=torch.promote_types(z.dtype, torch.float32))


class SelfDistillationLoss(PrototypeLoss):
    """Local views of an image say what its teacher says of the global view (SILC).

    `loss(head(local), head.teach(whole))` with a `TaughtHead` on any encoder's pooled embeddings.
    """

    def forward(
        self,
        student: HeadOutput,  # of B * V rows; views of an image follow one another
        teacher: HeadOutput | Targets,  # of B rows
        *,
        num_images: Tensor | float | None = None,  # what the mean divides by; None: B
    ) -> Tensor:  # ()
        """Mean over images of the mean over their views.

        Raises ValueError when the views do not divide among the teacher's images.
        """
        T, B = len(student.z), len(teacher.z)
        if (T % B if B else T) != 0:
            raise ValueError(f"need as many views of each image; got {T} views of {B} images")
        views = T // B if B else 0
        index = torch.arange(T, device=student.z.device) // max(views, 1)
        weight = _ones(student.z) / max(views, 1)
        total = max(B, 1) if num_images is None else num_images
        return self._cross_entropy(student, teacher, index, weight / total)


class MaskedPredictionLoss(PrototypeLoss):
    """Patches say what the teacher says of them, who sees those that are hidden (iBOT, TIPS).

    `loss(head(tokens[hidden]), head.teach(teacher_tokens[hidden]))` with a `TaughtHead` on any
    encoder's tokens; with all tokens in place of the hidden ones it is iBOT++ (TIPSv2).
    """

    def forward(
        self,
        student: HeadOutput,  # of S rows
        teacher: HeadOutput | Targets,  # of the same patches
        *,
        weight: Tensor | None = None,  # (S,) None: all alike
        num_images: Tensor | float | None = None,  # what the sum divides by; None: the weights' sum
    ) -> Tensor:  # ()
        """Weighted mean over patches.

        Raises ValueError when there are not as many patches on both sides.
        """
        S = len(student.z)
        if len(teacher.z) != S or (weight is not None and weight.shape != (S,)):
            of_weight = "" if weight is None else f" and weights {tuple(weight.shape)}"
            raise ValueError(
                f"need as many patches of teacher and student; got {len(teacher.z)} and {S}"
                f"{of_weight}"
            )
        if weight is None:
            weight = _ones(student.z)
        total = weight.sum() if num_images is None else num_images
        return self._cross_entropy(student, teacher, None, weight / total)
