import pytest
import torch
import torch.nn.functional as F
from compare import assert_no_worse
from siglip2_kernels import pairwise_sigmoid_loss_sums, sigmoid_loss
from siglip2_kernels.sigmoid_loss import _chunked, reference
from strategies import PAIR_SHAPES, RUNNERS, TEMPERATURES, runners_and_dtypes

NAMES = ("loss", "dimg", "dtxt", "dlog_scale", "dbias")
PAIRS = ("diagonal", "ids", "weighted")


def make_inputs(B, M, D, dtype, device="cpu", temperature="init"):
    """Unit vectors; the first captions resemble their images, as in a trained model."""
    g = torch.Generator().manual_seed(0)
    img = F.normalize(torch.randn(B, D, generator=g), dim=-1)
    txt = torch.randn(M, D, generator=g)
    n = min(B, M) // 2
    txt[:n] = img[:n] + 0.3 * txt[:n] / D**0.5
    scalars = (torch.tensor(value) for value in TEMPERATURES[temperature])
    inputs = [x.to(dtype) for x in (img, F.normalize(txt, dim=-1))] + list(scalars)
    return [x.to(device).requires_grad_() for x in inputs]


def make_pairs(kind, B, M, device="cpu"):
    """Several positives to an image, images without any, and weights far from 1."""
    if kind == "diagonal":
        return {}
    g = torch.Generator().manual_seed(1)
    ids = {
        "img_ids": torch.randint(0, B, (B,), generator=g) + 2**40,
        "txt_ids": torch.randint(0, B, (M,), generator=g) + 2**40,
    }
    if kind == "weighted":
        ids = {name: (x - 2**40).int() for name, x in ids.items()}
        ids["img_weight"] = torch.rand(B, generator=g) / 30_000
        ids["txt_weight"] = torch.rand(M, generator=g) * 7
    return {name: x.to(device) for name, x in ids.items()}


def value_and_grads(fn, inputs, dtype=None, dloss=1.0):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = fn(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, dloss))]


def scalar_terms(inputs, pairs, reduction):
    """Sums of absolute terms of the loss, dlog_scale and dbias, whose terms cancel."""
    img, txt, log_scale, bias = (x.detach().double() for x in inputs)
    pairs = {n: x.double() if x.is_floating_point() else x for n, x in pairs.items()}
    z = (log_scale.exp() * img @ txt.T + bias).requires_grad_()
    identity = torch.eye(txt.shape[0], dtype=z.dtype, device=z.device)
    one, zero = torch.ones((), dtype=z.dtype), torch.zeros((), dtype=z.dtype)
    scalars = (zero.to(z.device), zero.to(z.device))
    assert one == scalars[0].exp()
    loss = reference.sigmoid_loss(z, identity, *scalars, reduction=reduction, **pairs)
    (g,) = torch.autograd.grad(loss, z)
    raw = z - bias
    return {"loss": loss, "dlog_scale": (g * raw).abs().sum(), "dbias": g.abs().sum()}


def check_against_reference(inputs, pairs, dtype, reduction, backend):
    gold_pairs = {n: x.double() if x.is_floating_point() else x for n, x in pairs.items()}
    kwargs = {"reduction": reduction}
    gold = value_and_grads(
        lambda *a: reference.sigmoid_loss(*a, **kwargs, **gold_pairs), inputs, torch.float64
    )
    eager = value_and_grads(lambda *a: reference.sigmoid_loss(*a, **kwargs, **pairs), inputs)
    actual = value_and_grads(
        lambda *a: sigmoid_loss(*a, **kwargs, **pairs, backend=backend), inputs
    )
    terms = scalar_terms(inputs, pairs, reduction)
    for name, a, e, g in zip(NAMES, actual, eager, gold, strict=True):
        assert_no_worse(name, a, e, g, dtype, terms=terms.get(name, 0.0))


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last one short, at test sizes."""
    monkeypatch.setitem(_chunked.MAX_ELEMENTS, "cpu", 5000)
    monkeypatch.setattr(_chunked, "MAX_ELEMENTS_DEVICE", 5000)
    if any(name in ("triton-cpu", "triton-cuda") for name in ()):
        pytest.fail("unreachable")
