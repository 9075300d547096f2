"""A self-distillation head: T student and T teacher tokens against K prototypes, bottleneck D."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip2_kernels import prototype_cross_entropy
from siglip2_kernels.prototype_cross_entropy import reference

from ..case import Case, Cost, Mode, Rival

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
TEMPS = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}


def make(
    *,
    T: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    noise: float = 1.0,
) -> list[Tensor]:  # (T, D), (K, D), (T, D), (K, D), (K,)
    """Unit rows, students `noise` away from their teachers; a centre as the last."""
    draw = partial(torch.randn, device=device, generator=generator)
    unit = lambda x: F.normalize(x, dim=1)
    teacher_weight = unit(draw(K, D))
    near = torch.randint(0, K, (T,), device=device, generator=generator)
    teacher = unit(teacher_weight[near] + draw(T, D) / D**0.5)
    student = unit(teacher + noise * draw(T, D) / D**0.5)
    weight = unit(teacher_weight + 0.1 * draw(K, D) / D**0.5)
    rows = [x.to(dtype) for x in (student, weight, teacher, teacher_weight)]
    centre = teacher_weight @ teacher.mean(0)
    return [rows[0].requires_grad_(), rows[1].requires_grad_(), *rows[2:], -centre / TEACHER_TEMP]


def ours(backend: str | None = None, *, needs_cuda: bool = False) -> Rival:
    def loss(student, weight, teacher, teacher_weight, bias):
        return prototype_cross_entropy(
            *(student, weight, teacher, teacher_weight),
            **TEMPS,
            teacher_bias=bias,
            backend=backend,
        )

    return Rival(build=lambda: loss, needs_cuda=needs_cuda, is_ours=True)


def specification(student, weight, teacher, teacher_weight, bias) -> Tensor:
    return reference.prototype_cross_entropy(
        student, weight, teacher, teacher_weight, **TEMPS, teacher_bias=bias
    )


def uncentred(student, weight, teacher, teacher_weight, bias) -> Tensor:
    """What rivals without a bias compute."""
    return specification(student, weight, teacher, teacher_weight, None)


def divergence(student, weight, teacher, teacher_weight, bias) -> Tensor:
    """The same less the teacher's entropy: what KL losses return."""
    t = reference.prototype_logits(teacher, teacher_weight, TEACHER_TEMP).log_softmax(1)
    loss = uncentred(student, weight, teacher, teacher_weight, bias)
    return loss + (t.exp() * t).sum(1).mean()


def eager(student, weight, teacher, teacher_weight, bias) -> Tensor:
    """As DINOv2 has it: products in the inputs' dtype, the rest in float32 over whole matrices."""
    with torch.no_grad():
        t = F.linear(teacher, teacher_weight).float() / TEACHER_TEMP
        p = F.softmax(t + bias, dim=-1)
    s = F.linear(student, weight).float()
    return -torch.sum(p * F.log_softmax(s / STUDENT_TEMP, dim=-1), dim=-1).mean()


def liger_jsd() -> Callable[..., Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)

    def loss(student, weight, teacher, teacher_weight, bias):
        # One temperature for both sides: the rows carry ours.
        rows = student / STUDENT_TEMP, teacher / TEACHER_TEMP
        return module(rows[0], weight, rows[1], teacher_weight, None)

    return loss


def liger_distillation() -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0
    )

    def loss(student, weight, teacher, teacher_weight, bias):
        labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        rows = student / STUDENT_TEMP, teacher / TEACHER_TEMP
        return module(rows[0], weight, rows[1], teacher_weight, labels)

    return loss


def fla_kl() -> Callable[..., Tensor]:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    module = FusedKLDivLoss(reduction="batchmean")

    def loss(student, weight, teacher, teacher_weight, bias):
        return module(student / STUDENT_TEMP, teacher / TEACHER_TEMP, weight, teacher_weight)

    return loss


def attention() -> Callable[..., Tensor]:
    """Both softmaxes as attention of torch's over prototypes, with its backward for the weight.

    With rows and prototypes held, <student, x - y> / temp has the loss's gradients by the student
    and, through the values, by the weight.
    """

    def attend(rows, keys, values, scale):
        q, k, v = (x[None, None] for x in (rows.detach(), keys.detach(), values))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out[0, 0], lse[0, 0]

    def loss(student, weight, teacher, teacher_weight, bias):
        y, _ = attend(teacher, teacher_weight, weight, 1 / TEACHER_TEMP)
        x, lse = attend(student, weight, weight, 1 / STUDENT_TEMP)
        rows = student.float() / STUDENT_TEMP
        held = (x.float() - y.float()).detach()
        value = (lse - (rows * y.float()).sum(1)).mean().detach()
        carrier = (rows * held + rows.detach() * (x - y).float()).sum(1).mean()
        return value + carrier - carrier.detach()

    return loss


def bytes_a_logit(forward: float, full: float) -> Callable[..., float]:
    """Least memory of an implementation that holds something for each of the T x K logits."""

    def min_bytes(mode: Mode, *, T: int, K: int, D: int, dtype: torch.dtype) -> float:
        return T * K * (forward if mode == "forward" else full)

    return min_bytes


def cost(*, T: int, K: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    """Of keeping all logits: fewer products than of making them again, which ours do."""
    side_bytes = (T + K) * D * dtype.itemsize
    return {
        "forward": Cost(flops=4 * T * K * D, num_bytes=2 * side_bytes),
        "full": Cost(flops=8 * T * K * D, num_bytes=3 * side_bytes),
    }


_LIGER = {"module": "liger_kernel", "pip": "liger-kernel", "needs_cuda": True}

# Bytes a logit of eager, by what must live at a time: float32 logits and probabilities of the
# teacher, then logits, log-softmax and product of the student.
CASE = Case(
    x_name="K",
    x_label="prototypes",
    shapes=[
        {"T": 64, "K": 1000, "D": 64},
        {"T": 8704, "K": 65_536, "D": 256},
        {"T": 8704, "K": 32_768, "D": 256},
        {"T": 8704, "K": 131_072, "D": 256},
        {"T": 16_896, "K": 65_536, "D": 256},
    ],
    # No multiples of a tile or of a chunk.
    check_shapes={
        "cpu": {"T": 200, "K": 517, "D": 64},
        "cuda": {"T": 2000, "K": 16_384 + 8, "D": 256},
    },
    regimes={"students 1 away": {"noise": 1.0}, "students 0.1 away": {"noise": 0.1}},
    make=make,
    reference=specification,
    rivals={
        "eager": Rival(build=lambda: eager, min_bytes=bytes_a_logit(8, 12)),
        "compile": Rival(
            build=lambda: torch.compile(eager, dynamic=False), min_bytes=bytes_a_logit(4, 6)
        ),
        "siglip2": ours(),
        "siglip2-triton": ours("triton", needs_cuda=True),
        "siglip2-chunked": ours("chunked"),
        "attention": Rival(build=attention, needs_cuda=True, reference=uncentred),
        "liger-jsd": Rival(build=liger_jsd, reference=divergence, **_LIGER),
        "liger-distillation": Rival(build=liger_distillation, reference=divergence, **_LIGER),
        "fla-kl": Rival(
            build=fla_kl,
            reference=divergence,
            module="fla",
            pip="flash-linear-attention",
            needs_cuda=True,
        ),
    },
    cost=cost,
)
