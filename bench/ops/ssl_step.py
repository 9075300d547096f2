"""A whole micro-step of the last fifth of the recipe: B images, every loss, the teacher's average.

The sigmoid loss and the decoder see the images; the student sees a masked global view and 8 local
ones besides, the teacher the global one. Views, masks and texts are there beforehand, and the
optimiser's step is `fused_adamw`'s. Every rival takes the same float32 weights.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from siglip2.train.task import Siglip2Task
from siglip2_kernels.fused_adamw import average

from .. import ssl_rivals
from ..case import Case, Cost, Mode, Rival
from ..ssl_batch import (
    PATCH_SIZE,
    Batch,
    Sizes,
    Tensors,
    build_task,
    make,
    tensors_of,
    weight_shapes,
)
from . import locca_step

Finish = Callable[[Tensor], Tensor]  # what is done with the loss of a pass


class _Step(nn.Module):
    """The teacher is asked, then come the task's passes: what a trainer does with a batch."""

    def __init__(self, task: Siglip2Task):
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, finish: Finish) -> Tensor:
        model, ssl = self.task.model, self.task.ssl
        said = ssl.ask(model.vision, batch.views, batch.masks, dtype=model.dtype)
        inputs = {"image": batch.image, "text": batch.text, "task_texts": batch.task_texts}
        passes = self.task.passes
        total = sum(
            finish(self.task({**inputs, "prepared": said}, only=only)[0]["loss"]) for only in passes
        )
        for loss in ssl.losses():
            loss.update_centre()
        return total


class _PassByPass(torch.autograd.Function):
    """A pass, its backward, the next pass. The runner's backward then only hands over what leaves
    have gathered, as a trainer's parameters do.
    """

    @staticmethod
    def forward(ctx, run: Callable[..., Tensor], *weights: Tensor) -> Tensor:
        leaves = [w.detach().requires_grad_() for w in weights]
        with torch.enable_grad():
            total = run(*leaves)
        ctx.grads = [leaf.grad for leaf in leaves]
        return total

    @staticmethod
    def backward(ctx, dtotal: Tensor) -> tuple[Tensor | None, ...]:  # dtotal is 1
        return None, *ctx.grads


def _with_backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def siglip2(
    *, pack: Literal["all", "branch"] = "all", compiled: bool = False
) -> Callable[..., Tensor]:
    """`Siglip2Task` as it is; compiled, as the trainer compiles it."""
    steps: dict[tuple[Sizes, torch.dtype], _Step] = {}

    def step_of(batch: Batch) -> _Step:
        key = batch.sizes, batch.dtype
        if key not in steps:
            task = build_task(*key, pack)
            towers = (task.model.vision, task.model.text, task.locca.decoder, task.ssl.teacher)
            for module in towers if compiled else ():
                module.compile()
            steps[key] = _Step(task)
        return steps[key]

    def run(batch: Batch, scalars: Tensor, *flat: Tensor) -> Tensor:
        needs_grad, num_trained = torch.is_grad_enabled(), len(weight_shapes(batch.sizes)[0])
        trained, rest = flat[:num_trained], flat[num_trained:]
        if pack == "all" or not needs_grad:
            return forward(lambda loss: loss, batch, rest, scalars, *trained)
        return _PassByPass.apply(partial(forward, _with_backward, batch, rest), scalars, *trained)

    def forward(finish: Finish, batch: Batch, rest: tuple[Tensor, ...], scalars, *trained):
        w = tensors_of(batch, scalars, (*trained, *rest))
        total = functional_call(step_of(batch), _state(w), (batch, finish))
        with torch.no_grad():
            average(w.averages, w.students(), momentum=batch.sizes.ssl.ema_momentum)
        return total

    return run


def _state(w: Tensors) -> dict[str, Tensor]:
    """Centres are copied: the stage moves those that it has."""
    centres = {name: x.clone() for name, x in w.centres.items()}
    return {f"task.{name}": x for name, x in (w.student | w.teacher | centres).items()}


def _students(sizes: Sizes) -> int:
    """Rows that the student's heads compare: local views, and the patches that it does not see."""
    return sizes.B * sizes.ssl.views.num_local + sizes.B * (sizes.N // 2)


def bytes_a_logit(
    of_words: float, of_prototypes: float, *, is_padded: bool
) -> Callable[..., float]:
    """Least memory of an implementation that holds something for each logit until its backward."""

    def min_bytes(mode: Mode, *, dtype: torch.dtype, **shape: int) -> float:
        sizes = Sizes(**shape)
        texts = [t for image in locca_step.texts_of(sizes.B, sizes.V) for t in image]
        counted = sum(len(t.ids) - t.prefix for t in texts)
        words = len(texts) * locca_step.LENGTH if is_padded else counted
        rows = _students(sizes)
        return words * sizes.V * of_words + rows * sizes.K * of_prototypes

    return min_bytes


def cost(*, dtype: torch.dtype, **shape: int) -> dict[str, Cost]:
    """Useful FLOPs. Nothing is counted for MAP heads, whose probe makes keys and values of all
    tokens needless, nor for the sigmoid loss.
    """
    sizes = Sizes(**shape)
    B, N, D, V, K = sizes.B, sizes.N, sizes.D, sizes.V, sizes.K
    tower, head, num_local = sizes.tower, sizes.head, sizes.ssl.views.num_local
    patch = 2 * 3 * PATCH_SIZE**2 * D

    def passes(num: int, length: int) -> float:  # of sequences through a tower
        token = 2 * (4 * D * D + 2 * D * tower.mlp_width) + 4 * D * length
        return num * length * tower.depth * token

    seen = passes(B, N) + B * N * patch
    n = sizes.local_grid**2
    local = passes(B * num_local, n) + B * num_local * n * patch
    widths = [D, head.hidden_width, head.hidden_width, head.bottleneck, K]
    row = sum(2 * a * b for a, b in pairwise(widths))
    taught = seen + (B + B * (N // 2)) * row
    # Of the masked view's visible patches the last block has to make keys and values alone.
    needless = B * (N - N // 2) * (4 * D * D + 4 * D * tower.mlp_width + 4 * D * N)
    learned = 2 * seen - needless + local + passes(B, locca_step.LENGTH) + _students(sizes) * row
    decoder = locca_step.cost(B=B, N=N, D=D, depth=sizes.depth // 2, V=V, dtype=dtype)["full"]
    student, teacher = (
        4 * sum(s.numel() for s in shapes.values()) for shapes in weight_shapes(sizes)
    )
    # Weights read and gradients written; of each of the teacher's weights itself, its student, and
    # its average twice.
    num_bytes = 2 * student + 4 * teacher
    return {"full": Cost(flops=3 * learned + taught + decoder.flops, num_bytes=num_bytes)}


_SMALL = {"B": 4, "N": 16, "D": 128, "depth": 2, "V": 1000, "K": 200}
_REAL = {"N": 256, "V": 256_000, "K": 65_536}

# Bytes a logit. Eager keeps the log-softmax of words, and that of prototypes with the teacher's
# probabilities; compiled ones keep the products of words and of both sides' prototypes.
CASE = Case(
    x_name="B",
    x_label="images",
    shapes=[
        _SMALL,
        {"B": 64, **_REAL, "D": 768, "depth": 12},
        {"B": 32, **_REAL, "D": 1152, "depth": 27},
    ],
    check_shapes={
        "cpu": _SMALL,
        "cuda": {"B": 6, "N": 256, "D": 768, "depth": 2, "V": 32_003, "K": 8192 + 8},
    },
    make=make,
    reference=ssl_rivals.separate(),
    rivals={
        "eager": Rival(build=ssl_rivals.separate, min_bytes=bytes_a_logit(4, 8, is_padded=True)),
        "compile": Rival(
            build=partial(ssl_rivals.separate, compiled=True),
            min_bytes=bytes_a_logit(2, 4, is_padded=True),
        ),
        "composition": Rival(
            build=ssl_rivals.composition,
            needs_cuda=True,
            min_bytes=bytes_a_logit(2, 4, is_padded=False),
        ),
        "siglip2": Rival(build=siglip2, is_ours=True),
        "siglip2-branch": Rival(build=partial(siglip2, pack="branch"), is_ours=True),
        "siglip2-compile": Rival(build=partial(siglip2, compiled=True), is_ours=True),
    },
    cost=cost,
    modes=("full",),
)
