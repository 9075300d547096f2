"""What only a GPU can show of the prototype cross entropy."""

import pytest
import torch
from prototype_inputs import TEMPS, make_bias, make_prototypes, make_token_weight

from compare import assert_no_worse
from siglip2_kernels import prototype_cross_entropy, sinkhorn_bias
from siglip2_kernels.prototype_cross_entropy import reference

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "chunked"]
HALF = [torch.bfloat16, torch.float16]
T, K, D = 8704, 65_536, 256


def make(T, K, D, dtype=torch.bfloat16, S=None):
    """Inputs, and a teacher row for every fourth of the student's where S is given."""
    inputs = make_prototypes(T, K, D, dtype, "cuda", S=S)
    options = {"teacher_bias": make_bias(K, "cuda"), "token_weight": make_token_weight(T, "cuda")}
    if S is not None:
        options["teacher_index"] = torch.arange(T, device="cuda") % S
    return inputs, TEMPS | options


def loss_and_grads(inputs, **options):
    loss = prototype_cross_entropy(*inputs, **options)
    # A graph that outlives the call binds its leaves to the stream it was made on.
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]


@pytest.mark.parametrize("S", [None, 600])
@pytest.mark.parametrize("D", [256, 384, 512, 100])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64_at_length(backend, dtype, D, S):
    inputs, options = make(2048 + 33, 16_384 + 5, D, dtype, S=S)

    def evaluate(fn, convert, **extra):
        learned = [convert(x.detach()) for x in inputs]
        learned = [x.requires_grad_(i < 2) for i, x in enumerate(learned)]
        loss = fn(*learned, **options, **extra)
        return [loss.detach(), *torch.autograd.grad(loss, learned[:2])]

    gold = evaluate(reference.prototype_cross_entropy, torch.Tensor.double)
    eager = evaluate(reference.prototype_cross_entropy, lambda x: x.clone())
    ours = evaluate(prototype_cross_entropy, lambda x: x.clone(), backend=backend)
    for name, o, e, g in zip(("loss", "dstudent", "dweight"), ours, eager, gold, strict=True):
        assert_no_worse(name, o, e, g, dtype, terms=25.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinkhorn_matches_float64_at_length(backend, dtype):
    *_, teacher, weight = make(2048 + 33, 16_384 + 5, 256, dtype)[0]
    gold = reference.sinkhorn_bias(teacher.double(), weight.double(), teacher_temp=0.04)
    eager = reference.sinkhorn_bias(teacher, weight, teacher_temp=0.04)
    ours = sinkhorn_bias(teacher, weight, teacher_temp=0.04, backend=backend)
    assert_no_worse("bias", ours, eager, gold, torch.float32, terms=5 * 25.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_norm", [False, True])
def test_gradients_err_less_than_with_bfloat16_logits(backend, weight_norm):
    inputs, options = make(2048, 16_384, 256)
    temps = {name: options.pop(name) for name in TEMPS}

    def bfloat16_logits(student, weight, teacher, teacher_weight):
        if weight_norm:
            weight, teacher_weight = (
                torch.nn.functional.normalize(x, dim=1) for x in (weight, teacher_weight)
            )
        t = (teacher @ teacher_weight.T).float() / temps["teacher_temp"] + options["teacher_bias"]
        s = (student @ weight.T).float() / temps["student_temp"]
        losses = -(t.softmax(1) * s.log_softmax(1)).sum(1)
        return (losses * options["token_weight"]).sum()

    def grads(fn, convert):
        learned = [convert(x.detach()).requires_grad_(i < 2) for i, x in enumerate(inputs)]
        return torch.autograd.grad(fn(*learned), learned[:2])

    more = temps | options | {"weight_norm": weight_norm}
    gold = grads(lambda *x: reference.prototype_cross_entropy(*x, **more), torch.Tensor.double)
    ours = grads(lambda *x: prototype_cross_entropy(*x, **more, backend=backend), torch.clone)
    eager = grads(bfloat16_logits, torch.clone)
    for o, e, g in zip(ours, eager, gold, strict=True):
        assert (o.double() - g).norm() < (e.double() - g).norm()


@pytest.mark.parametrize("S", [None, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_replays_forward_and_backward(backend, S):
    inputs, options = make(300, 1000, 64, S=S)
    temp = torch.tensor(0.04, device="cuda")
    options |= {"backend": backend, "weight_norm": True, "teacher_temp": temp}
    options["valid_count"] = torch.tensor(290, device="cuda")

    def step():
        bias = sinkhorn_bias(*inputs[2:], teacher_temp=temp, weight_norm=True, backend=backend)
        return loss_and_grads(inputs, **options | {"teacher_bias": bias})

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    with torch.no_grad():
        for x in captured:
            x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    # The captured step reads the schedule's temperature and the batch's count anew.
    temp.fill_(0.07)
    options["valid_count"].fill_(123)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("S", [None, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits(backend, S):
    inputs, options = make(300, 1000, 64, S=S)
    options |= {"backend": backend, "valid_count": torch.tensor(200, device="cuda")}

    def step():
        sinkhorn_bias(*inputs[2:], teacher_temp=0.04, backend=backend)
        prototype_cross_entropy(*inputs, **options).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_number_of_tokens_compiles_nothing():
    from siglip2_kernels.prototype_cross_entropy import _sweep

    kernels = (
        _sweep._softmax_kernel,
        _sweep._merge_kernel,
        _sweep._dweight_kernel,
        _sweep._view_sum_kernel,
    )

    def count():
        return sum(len(c[0]) for kernel in kernels for c in kernel.device_caches.values())

    def step(T, S):
        inputs, options = make(T, 1024, 64, S=S)
        loss_and_grads(inputs, **options, backend="triton")
        sinkhorn_bias(*inputs[2:], teacher_temp=0.04, backend="triton")

    for S in (None, 48):
        step(160, S)
    before = count()
    for T in (1, 163, 320, 999, 4096):
        for S in (None, max(T // 3, 1)):
            step(T, S)
    assert count() == before


@pytest.mark.parametrize("S", [None, 1088])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_batches_are_bit_equal_twice(dtype, S):
    inputs, options = make(T, K, D, dtype, S=S)
    first, second = (loss_and_grads(inputs, **options, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    bias = [sinkhorn_bias(*inputs[2:], teacher_temp=0.04, backend="triton") for _ in range(2)]
    assert torch.equal(*bias)


def test_training_batch_takes_less_than_100_mb():
    inputs, options = make(T, K, D)
    few = [x[:256].detach().requires_grad_(x.requires_grad) for x in inputs]
    small = {"teacher_bias": options["teacher_bias"][:256]} | TEMPS
    loss_and_grads(few, **small)

    def step():
        bias = sinkhorn_bias(*inputs[2:], teacher_temp=0.04)
        return loss_and_grads(inputs, **options | {"teacher_bias": bias})

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    peak = torch.cuda.max_memory_allocated() - before
    extra = peak - sum(t.nbytes for t in result)
    print(f"{extra / 1e6:.1f} MB beyond inputs and gradients")
    assert extra < 100e6


def test_prototypes_of_more_than_two_to_the_31_numbers():
    rows, columns = 2**25 + 77, 128
    weight = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    inputs, _ = make(columns, 128, 64)
    bias = sinkhorn_bias(inputs[2], weight, teacher_temp=0.5, iterations=1, backend="triton")
    tail = reference.prototype_logits(inputs[2].double(), weight[-500:].double(), 0.5)
    gold = -torch.log(torch.tensor(rows, dtype=torch.float64)) - tail.logsumexp(0)
    eager = reference.prototype_logits(inputs[2], weight[-500:], 0.5).logsumexp(0)
    eager = -torch.log(torch.tensor(rows, dtype=torch.float32)) - eager
    assert_no_worse("bias", bias[-500:], eager, gold, torch.float32, terms=100.0)
