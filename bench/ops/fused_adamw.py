"""One optimiser step over the parameters of a model: clip to a norm, AdamW, EMA of a teacher.

Shapes are those of the released models: `towers=2` is both towers, `towers=1` vision alone.  Every
rival works in place on float32 tensors and goes on from where the call before left them.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from siglip2.models.presets import architecture
from siglip2.models.siglip2 import Siglip2
from siglip2.train.optim import parameter_groups
from siglip2_kernels import fused_adamw
from siglip2_kernels.fused_adamw import reference as specification
from siglip2_kernels.fused_adamw.inputs import Settings, Tensors

from ..case import Case, Cost, Rival

NAMES = {
    64: "siglip2-tiny-patch8-32",
    128: "siglip2-quickstart-patch8-32",
    768: "siglip2-base-patch16-256",
    1152: "siglip2-so400m-patch16-256",
}
LR, BETA1, BETA2, EPS, MOMENTUM, MAX_NORM = 1e-4, 0.9, 0.95, 1e-8, 0.996, 1.0
DECAYS = (0.1, 0.0)  # of the two groups
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "teachers", "steps")

Lists = dict[str, list[Tensor]]
Step = Callable[[Lists, list[slice]], None]  # all tensors by kind, and the two groups


@cache
def group_shapes(D: int, towers: int) -> tuple[list[torch.Size], list[torch.Size]]:
    with torch.device("meta"):
        model = Siglip2(architecture(NAMES[D]))
    groups = parameter_groups(model if towers == 2 else model.vision, DECAYS[0])
    decayed, rest = ([p.shape for p in group["params"]] for group in groups)
    return decayed, rest


def make(
    *, D: int, towers: int, dtype: torch.dtype, device: str, generator: torch.Generator
) -> list:
    """How many tensors decay, an anchor for the runner's gradient, then the lists in order."""
    decayed, rest = group_shapes(D, towers)
    shapes = [*decayed, *rest]

    def draw() -> list[Tensor]:
        return [torch.randn(s, device=device, generator=generator) for s in shapes]

    params, grads, exp_avgs = draw(), draw(), draw()
    squares, teachers = [x.square() for x in draw()], [p.clone() for p in params]
    steps = [torch.full((), 10.0, device=device) for _ in shapes]
    anchor = torch.zeros((), device=device, requires_grad=True)
    lists = (params, grads, exp_avgs, squares, teachers, steps)
    return [len(decayed), anchor, *(x for xs in lists for x in xs)]


def rival(step: Step) -> Callable[..., Tensor]:
    """What the runner calls: it wants a value, and a gradient where it checks."""

    def run(num_decayed: int, anchor: Tensor, *flat: Tensor) -> Tensor:
        n = len(flat) // len(LISTS)
        lists = {name: list(flat[i * n : (i + 1) * n]) for i, name in enumerate(LISTS)}
        with torch.no_grad():
            step(lists, [slice(num_decayed), slice(num_decayed, n)])
        if not torch.is_grad_enabled():
            return lists["params"][0]
        kinds = ("params", "exp_avgs", "exp_avg_sqs", "teachers")
        return torch.cat([x.flatten() for name in kinds for x in lists[name]]) + 0 * anchor

    return run


def coefficient(grads: list[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(grads, foreach=True)
    return (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)


def torch_step(lists: Lists, groups: list[slice]) -> None:
    _eager(lists, groups, fused=True)


def compiled_step() -> Callable[..., Tensor]:
    """The same without torch's fused kernel, which the compiler cannot look into."""
    compiled = torch.compile(lambda lists, groups: _eager(lists, groups, fused=False))
    return rival(compiled)


def _eager(lists: Lists, groups: list[slice], *, fused: bool) -> None:
    torch._foreach_mul_(lists["grads"], coefficient(lists["grads"]))
    for group, decay in zip(groups, DECAYS, strict=True):
        params, grads, exp_avgs, squares, _, steps = (lists[name][group] for name in LISTS)
        kind = {"fused": True} if fused else {"foreach": True, "capturable": True}
        adamw(params, grads, exp_avgs, squares, [], steps, amsgrad=False, maximize=False, lr=LR,
              beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=decay, **kind)  # fmt: skip
    torch._foreach_lerp_(lists["teachers"], lists["params"], 1 - MOMENTUM)


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def step(lists: Lists, groups: list[slice]) -> None:
        clip = coefficient(lists["grads"])
        for group, decay in zip(groups, DECAYS, strict=True):
            *state, teachers, steps = (lists[name][group] for name in LISTS)
            fused_adamw(*state, steps, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=decay,
                        clip_coefficient=clip, teachers=teachers, momentum=MOMENTUM,
                        backend=backend)  # fmt: skip

    return Rival(build=lambda: rival(step), needs_cuda=needs_cuda, is_ours=True)


def reference_step(lists: Lists, groups: list[slice]) -> None:
    clip = coefficient(lists["grads"])
    for group, decay in zip(groups, DECAYS, strict=True):
        *state, teachers, steps = (lists[name][group] for name in LISTS)
        empty = [None] * len(steps)
        specification.step(
            Tensors(*state, steps, teachers, empty, empty),
            Settings(LR, BETA1, BETA2, EPS, decay, MOMENTUM, clip, None, None),
        )


def cost(*, D: int, towers: int, dtype: torch.dtype) -> dict[str, Cost]:
    """Gradients are read twice: their norm must be known before the first update."""
    elements = sum(shape.numel() for shapes in group_shapes(D, towers) for shape in shapes)
    return {"forward": Cost(flops=0, num_bytes=40 * elements)}


CASE = Case(
    x_name="D",
    x_label="width of the towers",
    shapes=[
        {"D": 64, "towers": 2},
        {"D": 768, "towers": 2},
        {"D": 1152, "towers": 1},
    ],
    check_shapes={"cpu": {"D": 64, "towers": 2}, "cuda": {"D": 128, "towers": 2}},
    make=make,
    reference=rival(reference_step),
    rivals={
        "torch": Rival(build=lambda: rival(torch_step)),
        "torch-compile": Rival(build=compiled_step),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
    },
    cost=cost,
    dtypes=(torch.float32,),
    modes=("forward",),
)
