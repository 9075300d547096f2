"""What only a GPU can show of the sigmoid loss."""

import pytest
import torch

from siglip2_kernels import sigmoid_loss
from siglip2_kernels.sigmoid_loss import reference
from strategies import make_inputs

pytestmark = pytest.mark.gpu
DESIGNS = ["triton", "cublas"]


def loss_and_grads(inputs, **kwargs):
    loss = sigmoid_loss(*inputs, **kwargs)
    return [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("backend", DESIGNS)
def test_a_cuda_graph_replays_forward_and_backward(backend):
    inputs = make_inputs(300, 300, 768, torch.bfloat16, "cuda")
    # Leaves remember the stream of their first use while its graph lives: it must not be another
    # one than the captured stream.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = loss_and_grads(inputs, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = loss_and_grads(inputs, backend=backend)
    with torch.no_grad():
        for x in captured:
            x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("backend", DESIGNS)
def test_a_new_batch_size_compiles_nothing(backend):
    from siglip2_kernels.sigmoid_loss import _cublas, _triton

    kernel = {"triton": _triton._tile_kernel, "cublas": _cublas._pass_kernel}[backend]
    count = lambda: sum(len(caches[0]) for caches in kernel.device_caches.values())
    loss_and_grads(make_inputs(160, 160, 64, torch.bfloat16, "cuda"), backend=backend)
    before = count()
    for B in (1, 163, 320, 999, 4096):
        loss_and_grads(make_inputs(B, B, 64, torch.bfloat16, "cuda"), backend=backend)
    assert count() == before


@pytest.mark.parametrize("backend", DESIGNS)
def test_offsets_beyond_two_to_the_31(backend, monkeypatch):
    from siglip2_kernels.sigmoid_loss import _cublas

    # One chunk of 128 * (2^24 + 72) elements: the rows of one tile, which "triton" never cuts.
    monkeypatch.setattr(_cublas, "MAX_ELEMENTS", 1 << 32)
    B, M, D = 128, 2**24 + 72, 16
    g = torch.Generator("cuda").manual_seed(0)
    unit = lambda n: torch.nn.functional.normalize(
        torch.randn(n, D, device="cuda", generator=g), dim=-1
    ).bfloat16()
    img, txt = unit(B).requires_grad_(), unit(M).requires_grad_()
    scalars = [torch.tensor(v, device="cuda") for v in (2.3, -10.0)]
    ids = {"img_ids": torch.arange(B, device="cuda"), "txt_ids": torch.arange(M, device="cuda")}
    loss = sigmoid_loss(img, txt, *scalars, **ids, reduction="sum", backend=backend)
    dimg, dtxt = torch.autograd.grad(loss, (img, txt))

    img64 = img.detach().double().requires_grad_()
    total, last = 0.0, M - 4096
    for start in range(0, M, 1 << 20):
        part = slice(start, min(start + (1 << 20), M))
        named = {"img_ids": ids["img_ids"], "txt_ids": ids["txt_ids"][part]}
        txt64 = txt.detach()[part].double()
        value = reference.sigmoid_loss(img64, txt64, *scalars, reduction="sum", **named)
        value.backward()
        total += float(value)
    txt64 = txt.detach()[last:].double().requires_grad_()
    named = {"img_ids": ids["img_ids"], "txt_ids": ids["txt_ids"][last:]}
    value = reference.sigmoid_loss(img64.detach(), txt64, *scalars, reduction="sum", **named)
    (dtail,) = torch.autograd.grad(value, txt64)
    half_eps = torch.finfo(torch.bfloat16).eps
    assert abs(float(loss) / total - 1) < half_eps
    for actual, gold in ((dimg, img64.grad), (dtxt[last:], dtail)):
        error = (actual.double() - gold).norm() / gold.norm()
        assert error < 2 * half_eps  # one rounding of G, one of the result


@pytest.mark.parametrize("backend", DESIGNS)
def test_evaluation_holds_no_gradients(backend):
    inputs = [x.detach() for x in make_inputs(8192, 8192, 768, torch.bfloat16, "cuda")]
    sigmoid_loss(*inputs, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sigmoid_loss(*inputs, backend=backend)
    peak = torch.cuda.max_memory_allocated() - before
    chunk = {"triton": 0, "cublas": 8192 * 8192 * 2 + 2 * 8192 * 768 * 2}[backend]
    assert peak - chunk < 8 << 20


@pytest.mark.parametrize("backend", DESIGNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_batches_are_bit_equal_twice(dtype, backend):
    inputs = make_inputs(4096 + 33, 4096 + 33, 1152, dtype, "cuda", "trained")
    first, second = (loss_and_grads(inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", DESIGNS)
def test_float16_keeps_the_gradients_of_negatives_at_65536(backend):
    inputs = make_inputs(65_536, 65_536, 64, torch.float16, "cuda")
    loss = sigmoid_loss(*inputs, backend=backend)
    (dtxt,) = torch.autograd.grad(loss * 65536.0, inputs[1])
    # The second half of the captions resembles no image: all it gets comes from negatives.
    assert (dtxt[40_000:].float().norm(dim=1) > 0).all()
