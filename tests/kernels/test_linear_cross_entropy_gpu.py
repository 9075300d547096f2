"""What only a GPU can show of the linear cross entropy."""

import pytest
import torch
from head_inputs import make_extreme, make_head, make_target

from compare import assert_no_worse
from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy import reference

pytestmark = pytest.mark.gpu
DESIGNS = ["triton", "cublas"]
V = 256_000


def loss_and_grads(x, weight, target, **options):
    loss = linear_cross_entropy(x, weight, target, **options)
    return [loss, *torch.autograd.grad(loss, (x, weight))]


def make(T, words, D, dtype=torch.bfloat16, std=2.0):
    x, weight, _ = make_head(T, words, D, dtype, "cuda", std)
    return x, weight, make_target(T, words, "cuda")


@pytest.mark.parametrize("backend", DESIGNS)
def test_a_cuda_graph_replays_forward_and_backward(backend):
    # Logits of 200: the launches that start over run inside the graph.
    inputs = make_extreme(torch.bfloat16, "cuda")
    options = {"backend": backend, "chunk_tokens": 128}
    # Leaves remember the stream of their first use while its graph lives: it must not be another
    # one than the captured stream.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = loss_and_grads(*inputs, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = loss_and_grads(*inputs, **options)
    with torch.no_grad():
        for x in captured:
            x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", DESIGNS)
def test_the_host_never_waits(backend, dtype):
    inputs = make(300, 1000, 64, dtype)
    options = {"backend": backend, "return_lse": True, "return_accuracy": True, "z_loss": 1e-4}
    options |= {"valid_index": torch.arange(0, 300, 2, device="cuda")}
    linear_cross_entropy(*inputs, **options).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*inputs, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", DESIGNS)
def test_a_new_number_of_tokens_compiles_nothing(backend):
    from siglip2_kernels.linear_cross_entropy import _cublas, _exp_tile

    kernel = {"triton": _exp_tile._exp_tile_kernel, "cublas": _cublas._row_kernel}[backend]
    count = lambda: sum(len(caches[0]) for caches in kernel.device_caches.values())
    loss_and_grads(*make(160, 1000, 64), backend=backend)
    before = count()
    for T in (1, 163, 320, 999, 4096):
        loss_and_grads(*make(T, 1000, 64), backend=backend)
        loss_and_grads(*make(T, 1000, 64), backend=backend, chunk_tokens=77)
    assert count() == before


@pytest.mark.parametrize("backend", DESIGNS)
def test_logits_beyond_two_to_the_31(backend):
    T, D = 9000, 32
    x, weight, target = make(T, V, D)
    options = {"backend": backend, "chunk_tokens": T, "reduction": "sum"}
    loss, dx, dweight = loss_and_grads(x, weight, target, **options)
    last = slice(T - 500, T)
    tail = x.detach()[last].double().requires_grad_()
    words = weight.detach().double()
    gold = reference.linear_cross_entropy(tail, words, target[last], reduction="sum")
    (gold_dx,) = torch.autograd.grad(gold, tail)
    eager_x = x.detach()[last].requires_grad_()
    eager = reference.linear_cross_entropy(eager_x, weight.detach(), target[last], reduction="sum")
    (eager_dx,) = torch.autograd.grad(eager, eager_x)
    assert_no_worse("dx", dx[last], eager_dx, gold_dx, torch.bfloat16)
    assert loss.isfinite()
    # Gradients of logits sum to 0 over words in each token, so those of the weight do.
    size = dweight.double().abs().sum(0)
    assert (dweight.double().sum(0).abs() < 1e-2 * size).all()


# chunk_tokens, bytes beyond inputs, gradients and the float32 accumulator of the weight's gradient
@pytest.mark.parametrize(("chunk_tokens", "limit"), [(8192, 4.5e9), (2048, 1.2e9)])
@pytest.mark.parametrize("D", [768, 1152])
def test_peak_memory_of_a_training_batch(chunk_tokens, limit, D):
    T = 32_768
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(T, D, device="cuda", generator=g, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, device="cuda", generator=g, dtype=torch.bfloat16).mul_(D**-0.5)
    weight.requires_grad_()
    target = torch.randint(0, V, (T,), device="cuda", generator=g)
    loss_and_grads(x[:256], weight, target[:256])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = loss_and_grads(x, weight, target, chunk_tokens=chunk_tokens, backend="triton")
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(t.nbytes for t in result)
    assert peak - returned - 4 * V * D < limit


@pytest.mark.parametrize("backend", DESIGNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_batches_are_bit_equal_twice(dtype, backend):
    inputs = make(4096 + 33, 32_000, 1152, dtype, std=8.0)
    first, second = (loss_and_grads(*inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", DESIGNS)
def test_gradients_err_three_times_less_than_with_bfloat16_logits(backend):
    x, weight, _ = make(2048, 32_000, 768, std=8.0)
    target = torch.randint(0, 32_000, (2048,), device="cuda")

    def bfloat16_logits(x, weight, target):
        return torch.nn.functional.cross_entropy((x @ weight.T).float(), target)

    def grads(fn, *inputs):
        return torch.autograd.grad(fn(*inputs, target), inputs)

    gold = grads(reference.linear_cross_entropy, x.detach().double().requires_grad_(),
                 weight.detach().double().requires_grad_())  # fmt: skip
    ours = grads(lambda *a: linear_cross_entropy(*a, backend=backend), x, weight)
    eager = grads(bfloat16_logits, x, weight)
    for o, e, g in zip(ours, eager, gold, strict=True):
        assert 3 * (o.double() - g).norm() < (e.double() - g).norm()
