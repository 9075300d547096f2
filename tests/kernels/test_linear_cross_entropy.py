from functools import partial

import pytest
import torch
import torch.nn.functional as F
from head_inputs import (
    OPTIONS,
    SHAPES,
    make_extreme,
    make_head,
    make_target,
    make_token_weight,
)

from compare import assert_no_worse
from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy import reference
from strategies import RUNNERS, runners_and_dtypes

# Under the interpreter; a GPU has no warnings.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
NAMES = ("loss", "dx", "dweight", "dbias")


def value_and_grads(fn, inputs, target, dtype=None, dloss=1.0, **options):
    """Of x, weight and perhaps a bias."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    named = dict(zip(("x", "weight", "bias"), inputs, strict=False))
    loss = fn(target=target, **named, **options)
    dloss = torch.as_tensor(dloss, dtype=loss.dtype, device=loss.device).expand_as(loss)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, dloss)]


def check_against_reference(
    inputs, target, dtype, backend, dloss=1.0, chunk_tokens=None, largest_logit=1.0, **options
):
    evaluate = partial(value_and_grads, inputs=inputs, target=target, dloss=dloss, **options)
    gold = evaluate(reference.linear_cross_entropy, dtype=torch.float64)
    eager = evaluate(reference.linear_cross_entropy)
    actual = evaluate(linear_cross_entropy, backend=backend, chunk_tokens=chunk_tokens)
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=False):
        # Gold in float64 errs as well: by a rounding of each logit.
        terms = largest_logit * g.abs().max() if dtype is torch.float64 else 0.0
        assert_no_worse(name, a, e, g, dtype, terms=terms)


def skip_what_triton_lacks(backend, options):
    if backend == "triton" and "softcap" in options and "label_smoothing" in options:
        pytest.skip("the Triton design does not smooth capped logits")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_matches_reference(backend, device, dtype, shape, options):
    skip_what_triton_lacks(backend, options)
    T, V, _ = shape
    options = options | {"token_weight": make_token_weight(T, device)}
    inputs, target = make_head(*shape, dtype, device), make_target(T, V, device)
    check_against_reference(inputs, target, dtype, backend, chunk_tokens=100, **options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_other_reductions_match_reference(backend, device, dtype, reduction):
    inputs, target = make_head(131, 259, 40, dtype, device), make_target(131, 259, device)
    options = {"reduction": reduction, "z_loss": 1e-2}
    dloss = 3.0 if reduction == "sum" else torch.linspace(-1, 2, 131)
    check_against_reference(inputs, target, dtype, backend, dloss, **options)
    options["token_weight"] = make_token_weight(131, device)
    check_against_reference(inputs, target, dtype, backend, dloss, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_logits_of_200_and_std_8_match_reference(backend, device, dtype, reduction):
    x, weight, target = make_extreme(dtype, device)
    options = {"reduction": reduction, "largest_logit": 200.0}
    check_against_reference((x, weight), target, dtype, backend, **options)


@pytest.mark.parametrize(("backend", "device", "dtype"), runners_and_dtypes())
def test_float16_tokens_of_a_long_batch_do_not_underflow(backend, device, dtype):
    # The mean over 2^20 tokens: a gradient of logits that carries it is 0 in float16.
    inputs, target = make_head(20, 50, 16, dtype, device), make_target(20, 50, device)
    weight = torch.full((20,), 2.0**-20, device=device)
    options = {"token_weight": weight, "reduction": "sum"}
    check_against_reference(inputs, target, dtype, backend, dloss=2.0**20, **options)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_vanishing_weight_of_the_probabilities(backend, device):
    # 1 + 2 z_loss lse is 0 for the first token, and negative for others.
    x, weight, bias = make_head(20, 50, 16, torch.float32, device)
    with torch.no_grad():
        bias -= 12
        lse = (x @ weight.T + bias).logsumexp(1)
    target = make_target(20, 50, device)
    z_loss = float(-0.5 / lse[0])
    assert z_loss > 0
    check_against_reference((x, weight, bias), target, torch.float32, backend, z_loss=z_loss)


@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["all-ignored", "no-weight", "no-token"])
def test_without_a_counting_token_everything_is_zero(backend, device, reduction, case):
    T = 0 if case == "no-token" else 6
    inputs, target = make_head(T, 9, 16, torch.float32, device), make_target(T, 9, device)
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": backend}
    if case == "all-ignored":
        target.fill_(-100)
    if case == "no-weight":
        options["token_weight"] = torch.zeros(T, device=device)
    for result in value_and_grads(linear_cross_entropy, inputs, target, **options):
        assert (result == 0).all()
    result = linear_cross_entropy(
        *inputs[:2], target, **options, return_lse=True, return_accuracy=True
    )
    assert result.lse.shape == (T,)
    assert (result.token_accuracy == 0).all() or case == "no-weight"


@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_the_only_word_is_certain(backend, device):
    inputs, target = make_head(5, 1, 16, torch.float32, device), make_target(5, 1, device)
    results = value_and_grads(linear_cross_entropy, inputs, target, backend=backend)
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_torch_cross_entropy_in_float64(backend, reduction, label_smoothing):
    inputs, target = make_head(40, 11, 8, torch.float64), make_target(40, 11)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def torch_loss(x, weight, target, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target, **options)

    gold = value_and_grads(torch_loss, inputs, target)
    actual = value_and_grads(linear_cross_entropy, inputs, target, backend=backend, **options)
    for a, g in zip(actual, gold, strict=True):
        torch.testing.assert_close(a, g, rtol=0, atol=1e3 * torch.finfo(g.dtype).eps)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend, reduction):
    inputs = make_head(7, 5, 3, torch.float64)
    options = OPTIONS["everything"] | {"token_weight": make_token_weight(7), "backend": backend}
    target = make_target(7, 5)
    fn = lambda x, w, b: linear_cross_entropy(
        x, w, target, bias=b, reduction=reduction, chunk_tokens=3, **options
    )
    assert torch.autograd.gradcheck(fn, inputs)


def test_reference_is_the_double_loop():
    x, weight, bias = (t.detach() for t in make_head(4, 3, 2, torch.float64))
    target, total = torch.tensor([2, -100, 0, 1]), 0.0
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}
    for t in (0, 2, 3):
        z = [2.0 * torch.tanh((x[t] @ weight[v] + bias[v]) / 2.0) for v in range(3)]
        lse = sum(value.exp() for value in z).log()
        total += 0.01 * lse**2
        for v in range(3):
            total -= (0.9 * (v == int(target[t])) + 0.1 / 3) * (z[v] - lse)
    loss = reference.linear_cross_entropy(x, weight, target, bias=bias, **options)
    torch.testing.assert_close(loss, total / 3, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_statistics_are_those_of_the_logits(backend, device, reduction):
    x, weight, target = make_extreme(torch.float32, device)
    bias = make_head(1, 400, 1, torch.float32, device)[2]
    options = {"bias": bias, "reduction": reduction, "backend": backend}
    best = (F.linear(x, weight, bias)).argmax(1)
    target[10:60] = best[10:60]  # right answers, not all of them by far
    result = linear_cross_entropy(
        x, weight, target, return_lse=True, return_accuracy=True, **options
    )
    z = F.linear(x.double(), weight.double(), bias.double())
    eager = F.linear(x, weight, bias).logsumexp(1)
    assert_no_worse("lse", result.lse, eager, z.logsumexp(1), torch.float32)
    is_right = (z.argmax(1) == target).float()
    counts = target != -100
    expected = is_right if reduction == "none" else is_right[counts].mean()
    torch.testing.assert_close(result.token_accuracy, expected)
    assert result.loss.requires_grad
    assert not result.lse.requires_grad
    assert not result.token_accuracy.requires_grad
    alone = linear_cross_entropy(x, weight, target, **options)
    torch.testing.assert_close(alone, result.loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "device"), [*RUNNERS, ("reference", "cpu")])
def test_tokens_out_of_the_index_are_never_read(backend, device, reduction):
    (x, weight, bias), target = make_head(40, 60, 16, torch.float32, device), make_target(40, 60)
    token_weight, target = make_token_weight(40, device), target.to(device)
    index = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:23].to(device)
    inside = torch.zeros(40, dtype=torch.bool, device=device).index_fill(0, index, True)
    options = {"token_weight": token_weight, "reduction": reduction, "backend": backend}
    padded = torch.where(inside, target, -100)
    expected = value_and_grads(linear_cross_entropy, (x, weight, bias), padded, **options)
    garbage = torch.where(inside[:, None], x.detach(), torch.nan)
    fn = partial(linear_cross_entropy, valid_index=index)
    actual = value_and_grads(fn, (garbage, weight, bias), target, **options)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_no_worse(name, a, e, e.double(), torch.float32)
    assert (actual[1][~inside] == 0).all()
    result = fn(
        garbage, weight, target, bias=bias, return_lse=True, return_accuracy=True, **options
    )
    assert (result.lse[~inside] == 0).all()
    assert (result.lse[inside] != 0).all()
