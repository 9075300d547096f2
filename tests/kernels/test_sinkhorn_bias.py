"""Balancing of a teacher's prototypes, in one process and over ranks."""

import pytest
import torch
import torch.distributed as dist
from prototype_inputs import make_prototypes

from compare import assert_no_worse
from ranks import run
from siglip2_kernels import mean_prototype_logits, sinkhorn_bias
from siglip2_kernels.prototype_cross_entropy import reference
from strategies import RUNNERS, runners_and_dtypes

ALL_RUNNERS = [p for p in RUNNERS if "cublas" not in p.id]
ALL_DTYPES = [p for p in runners_and_dtypes() if "cublas" not in p.id]
TEMP = 0.04
SHAPES = {"one-token": (1, 5, 16), "ragged": (131, 259, 40), "few-prototypes": (150, 3, 72)}


def make_teacher(S, K, D, dtype, device="cpu"):
    return [x.detach() for x in make_prototypes(S, K, D, dtype, device)[2:]]


def check_bias(actual, teacher, weight, **options):
    dtype = teacher.dtype
    gold = reference.sinkhorn_bias(teacher.double(), weight.double(), teacher_temp=TEMP, **options)
    eager = reference.sinkhorn_bias(teacher, weight, teacher_temp=TEMP, **options)
    # A rounding of each logit, five times over.
    assert_no_worse("bias", actual, eager, gold, dtype, terms=5 * 25.0)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), ALL_DTYPES)
def test_matches_reference(backend, device, dtype, shape, iterations):
    teacher, weight = make_teacher(*shape, dtype, device)
    options = {"iterations": iterations}
    actual = sinkhorn_bias(teacher, weight, teacher_temp=TEMP, backend=backend, **options)
    check_bias(actual, teacher, weight, **options)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_softmax_with_the_bias_is_dinov2s_assignment(iterations):
    teacher, weight = make_teacher(24, 160, 32, torch.float64)
    logits = reference.prototype_logits(teacher, weight, TEMP)
    gold = reference.sinkhorn_probabilities(logits, iterations)
    for backend in ("reference", "chunked"):
        options = {"teacher_temp": TEMP, "iterations": iterations, "backend": backend}
        ours = (logits + sinkhorn_bias(teacher, weight, **options)).softmax(1)
        torch.testing.assert_close(ours, gold, rtol=0, atol=1e4 * torch.finfo(gold.dtype).eps)


def test_prototypes_get_equal_shares():
    teacher, weight = make_teacher(300, 20, 8, torch.float64)
    bias = sinkhorn_bias(teacher, weight, teacher_temp=0.5, iterations=50)
    shares = (reference.prototype_logits(teacher, weight, 0.5) + bias).softmax(1).sum(0)
    torch.testing.assert_close(shares, torch.full_like(shares, 300 / 20), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_rows_past_the_count_are_never_used(backend, device):
    teacher, weight = make_teacher(150, 70, 16, torch.float32, device)
    count = torch.tensor(90, device=device)
    padded = teacher.clone()
    padded[90:] = torch.nan
    actual = sinkhorn_bias(padded, weight, teacher_temp=TEMP, valid_count=count, backend=backend)
    check_bias(actual, teacher[:90], weight)
    mean = mean_prototype_logits(padded, weight, valid_count=count)
    gold = (teacher[:90].double() @ weight.double().T).mean(0)
    assert_no_worse("mean", mean, (teacher[:90] @ weight.T).mean(0), gold, torch.float32, terms=1.0)


@pytest.mark.parametrize(("backend", "device"), [*ALL_RUNNERS, ("reference", "cpu")])
def test_weight_norm_and_temperature_tensors(backend, device):
    teacher, weight = make_teacher(50, 70, 16, torch.float32, device)
    temp = torch.tensor(TEMP, device=device)
    options = {"teacher_temp": temp, "weight_norm": True, "backend": backend}
    check_bias(sinkhorn_bias(teacher, 7 * weight, **options), teacher, 7 * weight, weight_norm=True)
    actual = mean_prototype_logits(teacher, 7 * weight, weight_norm=True)
    gold = reference.prototype_logits(teacher.double(), 7 * weight.double(), 1.0, weight_norm=True)
    eager = reference.prototype_logits(teacher, 7 * weight, 1.0, weight_norm=True)
    assert_no_worse("mean", actual, eager.mean(0), gold.mean(0), torch.float32, terms=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_logits_are_the_mean_of_logits(dtype):
    teacher, weight = make_teacher(131, 70, 40, dtype)
    gold = reference.prototype_logits(teacher.double(), weight.double(), 1.0).mean(0)
    eager = reference.prototype_logits(teacher, weight, 1.0).mean(0)
    assert_no_worse("mean", mean_prototype_logits(teacher, weight), eager, gold, dtype, terms=1.0)
    assert (mean_prototype_logits(teacher[:0], weight) == 0).all()


@pytest.mark.parametrize(("backend", "device"), ALL_RUNNERS)
def test_compiles_without_graph_breaks_and_is_bit_equal_twice(backend, device):
    teacher, weight = make_teacher(50, 70, 16, torch.float32, device)
    fn = lambda t, w: (
        sinkhorn_bias(t, w, teacher_temp=TEMP, backend=backend),
        mean_prototype_logits(t, w),
    )
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(teacher, weight), fn(teacher, weight), strict=True):
        assert torch.equal(a, b)


def of_ranks(rank, world):
    """Ranks hold unequal shares; with four, the last holds nothing."""
    teacher, weight = make_teacher(101, 60, 16, torch.float32)
    bounds = {2: [0, 37, 101], 4: [0, 20, 21, 101, 101]}[world]
    rows = teacher[bounds[rank] : bounds[rank + 1]]
    group = dist.group.WORLD
    bias = sinkhorn_bias(rows, weight, teacher_temp=TEMP, group=group)
    again = sinkhorn_bias(rows, weight, teacher_temp=TEMP, group=group)
    return bias, again, mean_prototype_logits(rows, weight, group=group)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world):
    teacher, weight = make_teacher(101, 60, 16, torch.float32)
    results = run(world, of_ranks)
    gold = reference.prototype_logits(teacher.double(), weight.double(), 1.0).mean(0)
    eager = reference.prototype_logits(teacher, weight, 1.0).mean(0)
    for bias, again, mean in results:
        assert torch.equal(bias, again)
        assert torch.equal(bias, results[0][0])
        assert torch.equal(mean, results[0][2])
        check_bias(bias, teacher, weight)
        assert_no_worse("mean", mean, eager, gold, torch.float32, terms=1.0)
