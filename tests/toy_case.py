"""A bench case with one rival for each way of being right, wrong, broken or absent."""

import torch

from siglip2_bench.case import Case, Cost, Rival


def square_sum(x, w):
    return (x * w).square().sum()


def right_value_wrong_gradient(x, w):
    return (x * w).square().sum() + x.sum() - x.sum().detach()


def off_by_a_thousandth(x, w):
    return 1.001 * square_sum(x, w)


def not_a_number(x, w):
    return square_sum(x, w) * torch.tensor(torch.nan)


def broken(x, w):
    raise RuntimeError("no such kernel image\nand a second line")


def too_large(x, w):
    if x.numel() != TOY.check_shapes["cpu"]["N"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")
    return square_sum(x, w)


def declines(x, w):
    raise NotImplementedError("needs a width of 7")


def cube_sum(x, w):
    return (x * w).pow(3).sum()


def make(*, N, dtype, device, generator, scale=1.0):
    x = (scale * torch.randn(N, device=device, generator=generator)).to(dtype)
    return [x.requires_grad_(), torch.ones((), device=device, requires_grad=True)]


TOY = Case(
    x_name="N",
    x_label="numbers",
    shapes=[{"N": n} for n in (8, 16, 32)],
    check_shapes={"cpu": {"N": 50}},
    regimes={"small": {"scale": 1.0}, "large": {"scale": 100.0}},
    make=make,
    reference=square_sum,
    rivals={
        "eager": Rival(build=lambda: square_sum),
        "ours": Rival(build=lambda: square_sum, is_ours=True),
        "ours-cubed": Rival(build=lambda: cube_sum, reference=cube_sum, is_ours=True),
        "bad-gradient": Rival(build=lambda: right_value_wrong_gradient),
        "inexact": Rival(build=lambda: off_by_a_thousandth),
        "nan": Rival(build=lambda: not_a_number),
        "broken": Rival(build=lambda: broken),
        "too-large": Rival(build=lambda: too_large),
        "foreseen": Rival(
            build=lambda: square_sum,
            min_bytes=lambda mode, *, N, dtype: 2**70 if mode == "full" else 0,
        ),
        "declines": Rival(build=lambda: declines),
        "absent": Rival(build=lambda: square_sum, module="no_such_package", pip="no-such"),
        "gpu-only": Rival(build=lambda: square_sum, needs_cuda=True),
    },
    cost=lambda *, N, dtype: {"full": Cost(flops=6 * N, num_bytes=2 * N * dtype.itemsize)},
    dtypes=(torch.float32,),
)
