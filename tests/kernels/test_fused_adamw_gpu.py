"""What only a GPU can show of the one-pass optimiser."""

import pytest
import torch
from torch import nn

from compare import assert_no_worse
from siglip2.train.fused_adamw import FusedAdamW
from siglip2_kernels import fused_adamw

pytestmark = pytest.mark.gpu
RULES = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MOMENTUM = 0.99


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 1000), nn.GELU(), nn.Linear(1000, 33), nn.LayerNorm(33))


def make(device="cuda", **options):
    """A model, its optimiser and teachers; copies too."""
    model = make_model().to(device)
    optimizer = FusedAdamW(model.parameters(), **RULES | options)
    optimizer.momentum = torch.tensor(MOMENTUM, dtype=torch.float64, device=device)
    teachers, copies = [], []
    for p in model.parameters():
        teachers.append(p.detach().clone())
        copies.append(torch.empty_like(p, dtype=torch.bfloat16))
        optimizer.attach(p, teacher=teachers[-1], copy=copies[-1])
    return model, optimizer, teachers, copies


def fill(model, number):
    g = torch.Generator().manual_seed(number)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=g).to(p.device)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


def everything(model, optimizer, teachers, copies):
    state = [x for p in model.parameters() for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*model.parameters(), *teachers, *copies, *state)]


def run(number_of_steps, **options):
    made = make(**options)
    for i in range(number_of_steps):
        fill(made[0], i)
        made[1].clip_coefficient = torch.tensor(0.5, device="cuda")
        made[1].found_inf = torch.zeros((), device="cuda")
        made[1].step()
        made[1].zero_grad()
    return everything(*made)


def test_two_runs_are_bit_equal():
    assert all(torch.equal(a, b) for a, b in zip(run(5), run(5), strict=True))


def test_a_cuda_graph_replays_steps_with_a_schedule():
    lr = torch.tensor(0.0, device="cuda")
    captured, eager = make(capturable=True, lr=lr), make(lr=0.0)
    clip, found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")

    def step(made, number, rate):
        fill(made[0], number)
        clip.fill_(1 / (number + 1))
        if made is eager:
            for group in eager[1].param_groups:
                group["lr"] = float(torch.tensor(rate))  # as the tensor rounds it
            eager[1].clip_coefficient = clip
            eager[1].step()
        else:
            lr.fill_(rate)
            graph.replay()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        for made in (captured, eager):
            fill(made[0], 0)
            made[1].found_inf, made[1].clip_coefficient = found_inf, clip
            made[1].step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured[1].clip_coefficient = clip
    with torch.cuda.graph(graph):
        captured[1].step()
    for number, rate in ((1, 1e-2), (2, 5e-3), (3, 1e-3)):
        if number == 2:  # an eager step of other tensors in between changes nothing
            run(2)
        step(captured, number, rate)
        step(eager, number, rate)
    pairs = zip(everything(*captured), everything(*eager), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    found_inf.fill_(1)
    before = everything(*captured)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(everything(*captured), before, strict=True))


def test_a_whole_training_step_is_captured_with_gradients_of_the_graph():
    """Gradients are then made within the capture, and so is their table."""
    x = torch.randn(64, 70, device="cuda")

    def backward(made):
        made[0](x).square().mean().backward()

    captured, eager = make(capturable=True), make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for made in (captured, eager):
            backward(made)
            made[1].step()
            made[1].zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(captured)
        captured[1].step()
    for _ in range(3):
        graph.replay()
        backward(eager)
        eager[1].step()
        eager[1].zero_grad(set_to_none=True)
    pairs = zip(everything(*captured), everything(*eager), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_capture_needs_leave():
    model, optimizer, *_ = make()
    fill(model, 0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="need capturable=True in a CUDA graph; got False"):
        with torch.cuda.graph(graph):
            optimizer.step()


def test_the_host_never_waits_and_a_new_rate_compiles_nothing():
    from siglip2_kernels.fused_adamw import _triton

    kernels = (_triton._scalars_kernel, _triton._update_kernel)
    count = lambda: sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())
    model, optimizer, *_ = make()
    found_inf, clip = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]

    def step(i):
        for p, g in zip(model.parameters(), grads[i], strict=True):
            p.grad = g  # elsewhere each time
        optimizer.found_inf, optimizer.clip_coefficient = found_inf, clip
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3 * (i + 1), 0.5 / (i + 1)
        optimizer.step()

    step(0)
    before = count()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 4):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count() == before


def test_it_errs_no_more_than_torchs_fused_kernel():
    models = [make_model().cuda(), make_model().cuda(), make_model().double()]
    optimizers = [
        FusedAdamW(models[0].parameters(), **RULES),
        torch.optim.AdamW(models[1].parameters(), **RULES, fused=True),
        torch.optim.AdamW(models[2].parameters(), **RULES, foreach=False),
    ]
    for i in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            g = torch.Generator().manual_seed(i)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g).to(p.device, p.dtype)
            optimizer.step()
    for a, e, g in zip(*(m.parameters() for m in models), strict=True):
        assert_no_worse("p", a, e, g.cuda(), torch.float32)
    for name in ("exp_avg", "exp_avg_sq"):
        of = [[o.state[p][name] for p in m.parameters()]
              for o, m in zip(optimizers, models, strict=True)]  # fmt: skip
        for a, e, g in zip(*of, strict=True):
            assert_no_worse(name, a, e, g.cuda(), torch.float32)


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 4 * 4 * n + 2**30:
        pytest.skip("needs 36 GB of free memory")
    tail = slice(n - 3000, n)
    p, g, m, v = (torch.zeros(n, device="cuda") for _ in range(4))
    draw = torch.Generator().manual_seed(0)
    small = [torch.randn(3000, generator=draw).cuda() for _ in range(2)]
    p[tail], g[tail] = small
    fewer = [small[0].clone(), small[1].clone()]
    fewer += [torch.zeros(3000, device="cuda") for _ in range(2)]
    rules = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    for tensors in ((p, g, m, v), fewer):
        step = torch.zeros((), device="cuda")
        fused_adamw(*([x] for x in tensors), [step], **rules)
    for whole, part in zip((p, m, v), (fewer[0], *fewer[2:]), strict=True):
        assert torch.equal(whole[tail], part)
        assert not whole[: n - 3000].any()


def test_memory_beyond_the_tensors_is_small():
    """Tables and scalars: kilobytes, where eager steps hold temporaries as large as the weights."""
    p, g, m, v, t = (torch.randn(50_000_000, device="cuda") for _ in range(5))
    v.square_()
    step = torch.zeros((), device="cuda")
    rules = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_adamw([p], [g], [m], [v], [step], teachers=[t], momentum=0.9, **rules)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20
