"""Triton backend: a launch for the scalars of each tensor, a launch for all of their elements.

Elements come in chunks; a program makes one. Where a chunk is whole and its tensors' addresses are
multiples of 16 bytes, no access has a mask and each moves 16 bytes a thread; elsewhere (tails,
views, shards) accesses are masked and single.

What the kernels read of the lists lies in tables on the device, kept by addresses: a table is
right for whatever lives there.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.multi_tensor import addresses, chunk_table, int_table, is_capturing
from .inputs import Number, Settings, Tensors

CHUNK = 16384  # elements of a program
BLOCK = 2048  # elements of one round of it
NUM_WARPS = 8
ROWS = 128  # tensors of one program of the scalars' kernel
MAX_PLANS = 64  # lists whose tables are kept
COPY_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def unsupported(tensors: Tensors, settings: Settings) -> str | None:
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "teachers", "steps"):
        for x in getattr(tensors, name):
            if x is not None and x.dtype is not torch.float32:
                return f"needs float32 {name}, got {x.dtype}"
    copies = {x.dtype for x in (*tensors.copies, *tensors.teacher_copies) if x is not None}
    if len(copies) > 1 or not copies <= COPY_TYPES.keys():
        return f"needs copies in bfloat16 or in float16, got {sorted(map(str, copies))}"
    for name in ("params", "exp_avgs", "exp_avg_sqs", "teachers", "copies", "teacher_copies"):
        if not all(x is None or x.is_contiguous() for x in getattr(tensors, name)):
            return f"needs contiguous {name}"
    return None


@triton.jit
def _number(x, IS_POINTER: tl.constexpr):
    if IS_POINTER:
        x = tl.load(x).to(tl.float64)
    return x


@triton.jit(do_not_specialize=("num_tensors",))
def _scalars_kernel(
    steps_ptr,  # (N,) int64: addresses of float32
    scalars_ptr,  # (N, 8) float32, what _update_kernel reads
    found_inf_ptr,  # float32 or None
    grad_scale_ptr,  # any float or None
    clip_ptr,  # any float or None
    lr,  # number, or pointer to one
    weight_decay,  # number, or pointer to one
    momentum,  # 1 - momentum as a number, or pointer to the momentum
    rest1,  # 1 - beta1
    rest2,  # 1 - beta2
    eps,
    num_tensors,
    LR_IS_POINTER: tl.constexpr,
    DECAY_IS_POINTER: tl.constexpr,
    MOMENTUM_IS_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Advances the steps. float64: 1 - beta^t cancels in float32, and there are few of them."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = o < num_tensors
    ones = tl.full((ROWS,), 1.0, tl.float64)  # times a number of float32: that in float64
    p_step = tl.load(steps_ptr + o, mask=m, other=0).to(tl.pointer_type(tl.float32))
    b_t = tl.load(p_step, mask=m, other=0.0) + 1.0
    m_step = m
    if found_inf_ptr is not None:
        m_step = m & (ones * tl.load(found_inf_ptr) == 0.0)
    tl.store(p_step, b_t, mask=m_step)
    b_t = b_t.to(tl.float64)
    b_correction1 = 1.0 - tl.exp(b_t * tl.log(1.0 - rest1 * ones))
    b_correction2 = 1.0 - tl.exp(b_t * tl.log(1.0 - rest2 * ones))
    b_factor = ones
    if clip_ptr is not None:
        b_factor *= tl.load(clip_ptr).to(tl.float64)
    if grad_scale_ptr is not None:
        b_factor /= tl.load(grad_scale_ptr).to(tl.float64)
    b_lr = ones * _number(lr, LR_IS_POINTER)
    b_decay = b_lr * _number(weight_decay, DECAY_IS_POINTER)
    b_average = ones * _number(momentum, MOMENTUM_IS_POINTER)
    if MOMENTUM_IS_POINTER:
        b_average = 1.0 - b_average
    p = scalars_ptr + o * 8
    tl.store(p, b_factor.to(tl.float32), mask=m)
    tl.store(p + 1, (b_lr / b_correction1).to(tl.float32), mask=m)
    tl.store(p + 2, (1.0 / tl.sqrt(b_correction2)).to(tl.float32), mask=m)
    tl.store(p + 3, b_decay.to(tl.float32), mask=m)
    tl.store(p + 4, (ones * rest1).to(tl.float32), mask=m)
    tl.store(p + 5, (ones * rest2).to(tl.float32), mask=m)
    tl.store(p + 6, (ones * eps).to(tl.float32), mask=m)
    tl.store(p + 7, b_average.to(tl.float32), mask=m)


@triton.jit
def _pointer(address, start, TYPE: tl.constexpr, IS_WHOLE: tl.constexpr):
    p = (address + start * (TYPE.primitive_bitwidth // 8)).to(tl.pointer_type(TYPE))
    if IS_WHOLE:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _chunk(
    row,
    g_address,
    scalars,
    start,
    left,
    HAS_TEACHERS: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    HAS_TEACHER_COPIES: tl.constexpr,
    COPY: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All elements of a chunk from `start`, of which the tensor holds `left`."""
    factor, rate = tl.load(scalars), tl.load(scalars + 1)
    rsqrt_correction, decay = tl.load(scalars + 2), tl.load(scalars + 3)
    rest1, rest2 = tl.load(scalars + 4), tl.load(scalars + 5)
    eps, average = tl.load(scalars + 6), tl.load(scalars + 7)
    p_p = _pointer(tl.load(row + 1), start, tl.float32, IS_WHOLE)
    p_g = _pointer(g_address, start, tl.float32, IS_WHOLE)
    p_m = _pointer(tl.load(row + 2), start, tl.float32, IS_WHOLE)
    p_v = _pointer(tl.load(row + 3), start, tl.float32, IS_WHOLE)
    if HAS_TEACHERS:
        t_address = tl.load(row + 4)
        p_t = _pointer(t_address, start, tl.float32, IS_WHOLE)
    if HAS_COPIES:
        c_address = tl.load(row + 5)
        p_c = _pointer(c_address, start, COPY, IS_WHOLE)
    if HAS_TEACHER_COPIES:
        d_address = tl.load(row + 6)
        p_d = _pointer(d_address, start, COPY, IS_WHOLE)
    for i in range(0, CHUNK, BLOCK):
        o = i + tl.arange(0, BLOCK)
        m = (o < left) | IS_WHOLE
        b_p = tl.load(p_p + o, mask=m, other=0.0)
        b_g = tl.load(p_g + o, mask=m, other=0.0) * factor
        b_m = tl.load(p_m + o, mask=m, other=0.0)
        b_v = tl.load(p_v + o, mask=m, other=0.0)
        if HAS_TEACHERS:  # before the stores, which loads may not overtake
            b_t = tl.load(p_t + o, mask=m & (t_address != 0), other=0.0)
        b_m += rest1 * (b_g - b_m)
        b_v += rest2 * (b_g * b_g - b_v)
        b_p -= decay * b_p + rate * b_m / (tl.sqrt(b_v) * rsqrt_correction + eps)
        tl.store(p_p + o, b_p, mask=m)
        tl.store(p_m + o, b_m, mask=m)
        tl.store(p_v + o, b_v, mask=m)
        if HAS_COPIES:
            tl.store(p_c + o, b_p.to(COPY), mask=m & (c_address != 0))
        if HAS_TEACHERS:
            b_t += average * (b_p - b_t)
            tl.store(p_t + o, b_t, mask=m & (t_address != 0))
            if HAS_TEACHER_COPIES:
                tl.store(p_d + o, b_t.to(COPY), mask=m & (d_address != 0))


@triton.jit
def _update_kernel(
    chunks_ptr,  # (chunks, 2) int32: tensor, chunk in it
    table_ptr,  # (N, 7) int64: size; addresses of p, m, v, teacher, copy, the teacher's copy
    grads_ptr,  # (N,) int64: addresses
    scalars_ptr,  # (N, 8) float32, of _scalars_kernel
    found_inf_ptr,  # float32 or None
    HAS_TEACHERS: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    HAS_TEACHER_COPIES: tl.constexpr,
    COPY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (compiled away where there is none)
        if tl.load(found_inf_ptr) != 0.0:
            return
    p_chunk = chunks_ptr + 2 * tl.program_id(0)
    i_tensor, i_chunk = tl.load(p_chunk).to(tl.int64), tl.load(p_chunk + 1).to(tl.int64)
    row, scalars = table_ptr + 7 * i_tensor, scalars_ptr + 8 * i_tensor
    g_address = tl.load(grads_ptr + i_tensor)
    start = i_chunk * CHUNK
    left = tl.load(row) - start
    bits = g_address | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3)
    if HAS_TEACHERS:
        bits |= tl.load(row + 4)
    if HAS_COPIES:
        bits |= tl.load(row + 5)
    if HAS_TEACHER_COPIES:
        bits |= tl.load(row + 6)
    if (left >= CHUNK) & (bits % 16 == 0):
        _chunk(row, g_address, scalars, start, left, HAS_TEACHERS, HAS_COPIES,
               HAS_TEACHER_COPIES, COPY, True, CHUNK, BLOCK)  # fmt: skip
    else:
        _chunk(row, g_address, scalars, start, left, HAS_TEACHERS, HAS_COPIES,
               HAS_TEACHER_COPIES, COPY, False, CHUNK, BLOCK)  # fmt: skip


class Plan:
    """Tables of one list of tensors. Gradients move from step to step, so theirs is apart."""

    def __init__(self, columns: Sequence[tuple[int, ...]], device: torch.device):
        sizes, *rest, steps = columns
        flat = [value for row in zip(sizes, *rest, strict=True) for value in row]
        self.chunks = chunk_table(sizes, CHUNK, device)  # (chunks, 2) int32
        self.table = int_table(flat, device)  # (N, 7) int64, flat
        self.steps = int_table(steps, device)  # (N,)
        self._grads: tuple[int, ...] = ()
        self._grad_table: Tensor | None = None

    def grad_table(self, grads: tuple[int, ...], device: torch.device) -> Tensor:  # (N,) int64
        if is_capturing(device):  # the graph's own, whatever later steps find elsewhere
            return int_table(grads, device)
        if self._grad_table is None or self._grads != grads:
            self._grads, self._grad_table = grads, int_table(grads, device)
        return self._grad_table


_plans: OrderedDict[tuple, Plan] = OrderedDict()
_captured: list[Plan] = []  # read by CUDA graphs for as long as those live


def _plan(columns: Sequence[tuple[int, ...]], device: torch.device) -> Plan:
    """The plan of these tensors: kept, unless it is made within a capture."""
    key = (device, *columns)
    plan, capturing = _plans.get(key), is_capturing(device)
    if plan is None:
        plan = Plan(columns, device)
        if not capturing:
            _plans[key] = plan
            if len(_plans) > MAX_PLANS:
                _plans.popitem(last=False)
    elif capturing:
        _captured.append(plan)
    else:
        _plans.move_to_end(key)
    return plan


def _argument(x: Number, device: torch.device) -> Number:
    """A tensor there is read when the kernel runs; a number, or a tensor of the host, now."""
    return x if isinstance(x, Tensor) and x.device == device else float(x)


def step(tensors: Tensors, settings: Settings) -> None:
    s, params = settings, tensors.params
    device = params[0].device
    grads = [g.contiguous() for g in tensors.grads]
    kept = (params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.teachers,
            tensors.copies, tensors.teacher_copies, tensors.steps)  # fmt: skip
    plan = _plan([tuple(p.numel() for p in params), *map(addresses, kept)], device)
    scalars = torch.empty(len(params), 8, dtype=torch.float32, device=device)
    lr, decay = _argument(s.lr, device), _argument(s.weight_decay, device)
    momentum = 1.0 if s.momentum is None else _argument(s.momentum, device)
    in_memory = [isinstance(x, Tensor) for x in (lr, decay, momentum)]
    _scalars_kernel[(triton.cdiv(len(params), ROWS),)](
        plan.steps,
        scalars,
        s.found_inf,
        s.grad_scale,
        s.clip_coefficient,
        lr,
        decay,
        momentum if in_memory[2] else 1.0 - momentum,
        1.0 - s.beta1,
        1.0 - s.beta2,
        float(s.eps),
        len(params),
        *in_memory,
        ROWS=ROWS,
    )
    if len(plan.chunks):
        table = plan.grad_table(addresses(grads), device)
        _update_kernel[(len(plan.chunks),)](
            plan.chunks, plan.table, table, scalars, s.found_inf, **options(tensors)
        )


def options(tensors: Tensors) -> dict[str, Any]:
    """Constants of _update_kernel's launch."""
    copies = [x.dtype for x in (*tensors.copies, *tensors.teacher_copies) if x is not None]
    return {
        "HAS_TEACHERS": any(x is not None for x in tensors.teachers),
        "HAS_COPIES": any(x is not None for x in tensors.copies),
        "HAS_TEACHER_COPIES": any(x is not None for x in tensors.teacher_copies),
        "COPY": COPY_TYPES[copies[0]] if copies else None,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }
