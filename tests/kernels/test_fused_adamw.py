"""One step of many tensors against float64 and against torch's own optimiser."""

from functools import partial

import pytest
import torch

from compare import assert_no_worse
from siglip2_kernels import fused_adamw
from siglip2_kernels._core.backend import INTERPRET
from siglip2_kernels.fused_adamw import reference
from siglip2_kernels.fused_adamw.inputs import Settings, Tensors

RUNNERS = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param("triton", "cpu", id="triton-cpu", marks=pytest.mark.interpreter),
    pytest.param("torch", "cuda", id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]
TRITON = [runner for runner in RUNNERS if runner.values[0] == "triton"]
# A scalar, nothing, one element, ends within a block, just over a chunk, a whole chunk.
SHAPES = [(), (0,), (1,), (5, 3), (2049,), (3, 5462), (16384,), (7, 0, 3)]
RULES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
NUM_STEPS = 20
STATE = ("params", "exp_avgs", "exp_avg_sqs", "steps", "teachers")


def make(device="cpu", shapes=SHAPES):
    """Parameters as after some training, with teachers; gradients come step by step."""
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=g) for shape in shapes]
    teachers = [p + 0.1 * torch.randn(p.shape, generator=g) for p in params]
    zeros = lambda: [torch.zeros_like(p) for p in params]
    steps = [torch.zeros(()) for _ in params]
    state = dict(zip(STATE, (params, zeros(), zeros(), steps, teachers), strict=True))
    return {name: [x.to(device) for x in xs] for name, xs in state.items()}


def gradients(number, device="cpu", shapes=SHAPES):
    """Of sizes from 1e-6 to 1: the second moment spans twelve decades."""
    g = torch.Generator().manual_seed(100 + number)
    draw = lambda shape: (
        torch.randn(shape, generator=g) * 10 ** (-6 * torch.rand(shape, generator=g))
    )
    return [draw(shape).to(device) for shape in shapes]


def clone(state, dtype=torch.float32):
    return {name: [x.to(dtype, copy=True) for x in xs] for name, xs in state.items()}


def call(state, grads, **options):
    lists = [state[name] for name in STATE[:4]]
    fused_adamw(lists[0], grads, *lists[1:], teachers=state["teachers"], **options)


def step_reference(state, grads, *, momentum, **options):
    empty = [None] * len(grads)
    tensors = Tensors(
        state["params"], grads, state["exp_avgs"], state["exp_avg_sqs"], state["steps"],
        state["teachers"], empty, empty,
    )  # fmt: skip
    base = dict.fromkeys(("clip_coefficient", "grad_scale", "found_inf"))
    reference.step(tensors, Settings(**base | options | {"momentum": momentum}))


def torch_optimizer(params):
    rules = {name: RULES[name] for name in ("lr", "eps", "weight_decay")}
    return torch.optim.AdamW(params, betas=(RULES["beta1"], RULES["beta2"]), foreach=True, **rules)


def eager_step(state, optimizer, grads, momentum):
    """torch.optim.AdamW with foreach, then a lerp: what is in use today."""
    for p, g in zip(state["params"], grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    torch._foreach_lerp_(state["teachers"], state["params"], 1 - momentum)


def compare(actual, eager, gold):
    for name in STATE:
        for i, (a, e, g) in enumerate(zip(actual[name], eager[name], gold[name], strict=True)):
            assert_no_worse(f"{name}[{i}]", a, e, g, torch.float32)


@pytest.mark.parametrize("momentum", [0.9, 0.9996])
@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_twenty_steps_err_no_more_than_torch(backend, device, momentum):
    actual, start = make(device), make()
    eager, gold = clone(start), clone(start, torch.float64)
    optimizer = torch_optimizer(eager["params"])
    for i in range(NUM_STEPS):
        call(actual, gradients(i, device), momentum=momentum, backend=backend, **RULES)
        eager_step(eager, optimizer, gradients(i), momentum)
        step_reference(gold, [g.double() for g in gradients(i)], momentum=momentum, **RULES)
    of = lambda name: [optimizer.state[p][name] for p in eager["params"]]
    eager |= {"exp_avgs": of("exp_avg"), "exp_avg_sqs": of("exp_avg_sq"), "steps": of("step")}
    eager = {name: [x.detach() for x in xs] for name, xs in eager.items()}
    compare(actual, eager, gold)
    assert all(float(count) == NUM_STEPS for count in actual["steps"])


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_scale_and_clip_act_on_the_gradient(backend, device):
    actual, start = make(device), make()
    eager, gold = clone(start), clone(start, torch.float64)
    scalars = {"clip_coefficient": torch.tensor(0.3), "grad_scale": torch.tensor(4096.0)}
    moved = {name: x.to(device) for name, x in scalars.items()}
    for i in range(3):
        scaled = [4096 * g for g in gradients(i, device)]
        call(actual, scaled, momentum=0.99, backend=backend, **RULES, **moved)
        for state in (eager, gold):
            dtype = state["params"][0].dtype
            grads = [4096 * g.to(dtype) for g in gradients(i)]
            step_reference(state, grads, momentum=0.99, **RULES, **scalars)
    compare(actual, eager, gold)


@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_gradients_stay_as_they_were(backend, device):
    state, grads = make(device), gradients(0, device)
    before = [g.clone() for g in grads]
    clip = torch.tensor(0.5, device=device)
    call(state, grads, momentum=0.9, backend=backend, clip_coefficient=clip, **RULES)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_found_inf_leaves_everything_as_it_was(backend, device):
    state = make(device)
    call(state, gradients(0, device), momentum=0.9, backend=backend, **RULES)
    before = clone(state)
    grads = [torch.full_like(g, torch.nan) for g in gradients(1, device)]
    nan = torch.tensor(torch.nan, device=device)
    run = partial(call, state, momentum=0.9, backend=backend, clip_coefficient=nan, **RULES)
    run(grads, found_inf=torch.ones((), device=device))
    for name in STATE:
        assert all(torch.equal(a, b) for a, b in zip(state[name], before[name], strict=True)), name
    call(state, gradients(1, device), momentum=0.9, backend=backend,
         found_inf=torch.zeros((), device=device), **RULES)  # fmt: skip
    assert not torch.equal(state["params"][3], before["params"][3])
    assert float(state["steps"][3]) == 2


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_numbers_may_be_tensors(backend, device):
    """The same values as numbers and as tensors; a schedule then writes into them."""
    if (backend, device) == ("torch", "cuda"):
        pytest.skip("torch takes weight decay as a number there")
    first, second = make(device), make(device)
    tensors = {"lr": torch.zeros((), device=device), "weight_decay": torch.zeros(1, device=device)}
    tensors["momentum"] = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(3):
        # Exact in float32, so that both read the same.
        numbers = {"lr": 2.0 ** -(6 + i), "weight_decay": 0.125 * (i + 1), "momentum": 1 - 2**-5}
        for name, value in numbers.items():
            tensors[name].fill_(value)
        call(first, gradients(i, device), backend=backend, **RULES | numbers)
        call(second, gradients(i, device), backend=backend, **RULES | tensors)
    for name in STATE:
        for a, b in zip(first[name], second[name], strict=True):
            assert_no_worse(name, a, b, b.double(), torch.float32)
            if backend == "triton":
                assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_copies_are_the_new_weights_rounded(backend, device):
    # The interpreter's bfloat16 is left alone, as in the other tests.
    dtype = torch.float16 if (backend, device) == ("triton", "cpu") else torch.bfloat16
    state = make(device)
    copies = [torch.zeros_like(p, dtype=dtype) for p in state["params"]]
    of_teachers = [torch.zeros_like(p, dtype=dtype) for p in state["params"]]
    untouched = copies[3] = None
    call(state, gradients(0, device), momentum=0.9, backend=backend, copies=copies,
         teacher_copies=of_teachers, **RULES)  # fmt: skip
    assert copies[3] is untouched
    for p, t, c, d in zip(state["params"], state["teachers"], copies, of_teachers, strict=True):
        assert c is None or torch.equal(c, p.to(dtype))
        assert torch.equal(d, t.to(dtype))


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_some_parameters_have_no_teacher(backend, device):
    some, every = make(device), make(device)
    some["teachers"] = [t if i % 2 else None for i, t in enumerate(some["teachers"])]
    for i in range(2):
        call(some, gradients(i, device), momentum=0.9, backend=backend, **RULES)
        call(every, gradients(i, device), momentum=0.9, backend=backend, **RULES)
    for name in STATE:
        pairs = zip(some[name], every[name], strict=True)
        assert all(a is None or torch.equal(a, b) for a, b in pairs), name


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_views_that_no_vector_access_fits(backend, device):
    """Shards of FSDP2 and views begin anywhere: here 4 bytes after a multiple of 16."""
    shapes = [(40_000,), (16_384,), (3,)]
    whole, shifted = make(device, shapes), make(device, shapes)
    shift = lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    shifted = {name: [shift(x) for x in xs] for name, xs in shifted.items()}
    for i in range(2):
        grads = gradients(i, device, shapes)
        call(whole, [g.clone() for g in grads], momentum=0.9, backend=backend, **RULES)
        call(shifted, [shift(g) for g in grads], momentum=0.9, backend=backend, **RULES)
    for name in STATE:
        for a, b in zip(whole[name], shifted[name], strict=True):
            # torch's vectorised and scalar loops may round apart on the CPU
            assert_no_worse(name, a, b, b.double(), torch.float32)
            if backend == "triton":
                assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_gradients_may_lie_elsewhere_each_step_and_have_any_strides(backend, device):
    shapes = [(50, 70)]
    one, two = make(device, shapes), make(device, shapes)
    kept = []  # so that no address comes twice
    for i in range(3):
        (g,) = gradients(i, device, shapes)
        kept.append(g.T.contiguous().T)
        call(one, [g], momentum=0.9, backend=backend, **RULES)
        call(two, kept[-1:], momentum=0.9, backend=backend, **RULES)
    assert torch.equal(one["params"][0], two["params"][0])


@pytest.mark.parametrize(("backend", "device"), TRITON)
def test_offsets_beyond_two_to_the_31(backend, device):
    """A chunk far into a tensor: its addresses are moved back by as much, so it is really there."""
    from siglip2_kernels._core.multi_tensor import int_table
    from siglip2_kernels.fused_adamw import _triton

    shapes = [(_triton.CHUNK + 100,)]
    state, expected, (g,) = make(device, shapes), make(device, shapes), gradients(0, device, shapes)
    call(expected, [g], momentum=0.9, backend=backend, **RULES)
    far = 2**31 // _triton.CHUNK + 3
    start = 4 * far * _triton.CHUNK
    empty = [None]
    lists = (state["params"], state["exp_avgs"], state["exp_avg_sqs"], state["teachers"])
    columns = [[far * _triton.CHUNK + g.numel()]]
    columns += [[xs[0].data_ptr() - start] for xs in lists] + [[0], [0]]
    t = torch.device(g.device)
    scalars = torch.zeros(1, 8, device=device)
    _triton._scalars_kernel[(1,)](
        int_table([state["steps"][0].data_ptr()], t), scalars, None, None, None, RULES["lr"],
        RULES["weight_decay"], 1 - 0.9, 1 - RULES["beta1"], 1 - RULES["beta2"], RULES["eps"], 1,
        False, False, False, ROWS=_triton.ROWS,
    )  # fmt: skip
    tensors = Tensors(state["params"], [g], *[state[n] for n in STATE[1:4]], lists[3], empty, empty)
    chunks = torch.tensor([[0, far], [0, far + 1]], dtype=torch.int32, device=device)
    _triton._update_kernel[(2,)](
        chunks, int_table([c for (c,) in columns], t), int_table([g.data_ptr() - start], t),
        scalars, None, **_triton.options(tensors),
    )  # fmt: skip
    for name in STATE:
        assert torch.equal(state[name][0], expected[name][0]), name


def test_chunks_cover_every_element_once():
    from siglip2_kernels._core.multi_tensor import chunk_table

    table = chunk_table([5, 0, 8, 9, 1], 4, torch.device("cpu"))
    assert table.tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2], [4, 0]]
    assert chunk_table([0, 0], 4, torch.device("cpu")).shape == (0, 2)


def test_tables_hold_addresses_exactly():
    from siglip2_kernels._core.multi_tensor import int_table

    values = [2**63 - 1, 2**53 + 1, 0, 140_000_000_000_003] * 200
    assert int_table(values, torch.device("cpu")).tolist() == values


@pytest.mark.parametrize(("backend", "device"), RUNNERS)
def test_two_runs_are_bit_equal(backend, device):
    runs = [make(device) for _ in range(2)]
    for state in runs:
        for i in range(3):
            call(state, gradients(i, device), momentum=0.9, backend=backend, **RULES)
    for name in STATE:
        assert all(torch.equal(a, b) for a, b in zip(*(s[name] for s in runs), strict=True))


def test_the_reference_is_torch_in_float64():
    mine, theirs = clone(make(), torch.float64), clone(make(), torch.float64)
    optimizer = torch_optimizer(theirs["params"])
    for i in range(5):
        grads = [g.double() for g in gradients(i)]
        step_reference(mine, grads, momentum=0.9, **RULES)
        eager_step(theirs, optimizer, grads, 0.9)
    for name in ("params", "teachers"):
        for a, b in zip(mine[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=2e-14, atol=1e-15)


def test_nothing_to_do():
    fused_adamw([], [], [], [], [], **RULES)


def one(**other):
    x = [torch.zeros(3)]
    lists = {"params": x, "grads": x, "exp_avgs": x, "exp_avg_sqs": x, "steps": [torch.zeros(())]}
    return fused_adamw(**lists | RULES | other)


def test_rejects_wrong_input():
    with pytest.raises(ValueError, match=r"need one of grads a parameter: 1; got 0"):
        one(grads=[])
    with pytest.raises(ValueError, match=r"need exp_avgs like .*, \(3,\) on cpu; got \(4,\) on cp"):
        one(exp_avgs=[torch.zeros(4)])
    with pytest.raises(ValueError, match="need momentum with teachers; got None"):
        one(teachers=[torch.zeros(3)])
    with pytest.raises(ValueError, match="need a teacher where teacher_copies has an entry"):
        one(teacher_copies=[torch.zeros(3)])
    with pytest.raises(
        ValueError, match=r"need beta2: a number of at least 0 and below 1; got 1\.5"
    ):
        one(beta2=1.5)
    with pytest.raises(ValueError, match="need found_inf on cpu as parameters; got meta"):
        one(found_inf=torch.zeros((), device="meta"))
    with pytest.raises(ValueError, match="need backend None or one of 'triton', 'torch'"):
        one(backend="cuda")


@pytest.mark.skipif(INTERPRET, reason="triton runs there")
def test_triton_on_the_cpu_says_why_not():
    with pytest.raises(NotImplementedError, match="backend 'triton': needs a CUDA tensor, got cpu"):
        one(backend="triton")


@pytest.mark.interpreter
def test_triton_says_what_it_needs():
    with pytest.raises(NotImplementedError, match=r"needs float32 grads, got torch\.float64"):
        one(grads=[torch.zeros(3).double()], backend="triton")
    half = {"copies": [torch.zeros(3).half()], "teachers": [torch.zeros(3)], "momentum": 0.9}
    with pytest.raises(NotImplementedError, match="needs copies in bfloat16 or in float16"):
        one(**half, teacher_copies=[torch.zeros(3).bfloat16()], backend="triton")
    x = torch.zeros(3, 4).T
    with pytest.raises(NotImplementedError, match="needs contiguous params"):
        one(params=[x], grads=[x], exp_avgs=[x], exp_avg_sqs=[x], backend="triton")
