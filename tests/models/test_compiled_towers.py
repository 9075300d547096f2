"""Compiled towers: whatever the mix of images, few graphs, none broken, no wait for the device."""

import pytest
import torch
from models.tiny import random_model, tiny_architecture
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from siglip2.data.images import naflex_size
from siglip2.models.sequences import ragged

BUDGETS = (128, 256, 576, 784, 1024)
SIZES = [(480, 640), (640, 480), (427, 640), (500, 333), (300, 300), (90, 900)]  # as photos have


def naflex_batch(budget, turn):
    """Six photos, each at the budget; another order of sizes for each turn."""
    sizes = SIZES[turn:] + SIZES[:turn]
    if turn % 2:
        sizes[0] = (200 + 10 * turn, 640)
    pixels = [naflex_size(*size, 4, budget) for size in sizes]
    grids = [(h // 4, w // 4) for h, w in pixels]
    lengths = [h * w for h, w in grids]
    generator = torch.Generator().manual_seed(turn)
    patches = torch.randint(0, 256, (sum(lengths), 48), dtype=torch.uint8, generator=generator)
    return patches, torch.tensor(grids, dtype=torch.int32), ragged(lengths, torch.device("cpu"))


@pytest.fixture
def tower():
    torch._dynamo.reset()
    yield random_model(tiny_architecture(is_naflex=True)).vision
    torch._dynamo.reset()


def test_five_budgets_compile_at_most_five_graphs(tower):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tower, backend=counter, fullgraph=True)
    for turn in range(3):
        for budget in BUDGETS:
            batch = naflex_batch(budget, turn)
            out = compiled(*batch)
            (out.pooled.square().sum() + out.tokens.square().sum()).backward()
    assert 1 <= counter.frame_count <= len(BUDGETS)


def test_compiled_equals_eager(tower):
    batch = naflex_batch(128, 0)
    results = []
    for encode in (tower, torch.compile(tower, backend="aot_eager", fullgraph=True)):
        tower.zero_grad()
        pooled = encode(*batch).pooled
        pooled.square().sum().backward()
        results.append([pooled.detach(), *(p.grad for p in tower.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("pool", ["last", "map"])
def test_text_tower_compiles_once_more_for_all_other_batch_sizes(pool):
    torch._dynamo.reset()
    architecture = tiny_architecture(pool=pool)
    model = random_model(architecture)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.text, backend=counter, fullgraph=True)
    for num in (3, 5, 8, 13):
        text = torch.randint(0, 37, (num, architecture.text.length))
        assert torch.equal(compiled(text), model.text(text))
    assert counter.frame_count <= 2


def test_a_step_of_the_tower_reads_no_number_of_the_device(tower):
    """A fake tensor has none: whatever asks for one raises. `grid_hw` is real, and on the host."""
    patches, grid_hw, seqs = naflex_batch(256, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = lambda x: mode.from_tensor(x, static_shapes=True) if torch.is_tensor(x) else x
        for module in tower.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(fake(parameter.detach())))
        plan = seqs.plan._make(map(fake, seqs.plan))
        out = tower(fake(patches), grid_hw, seqs._replace(cu_seqlens=plan.cu_seqlens, plan=plan))
        (out.pooled.square().sum() + out.tokens.square().sum()).backward()
        with pytest.raises(DataDependentOutputException):
            out.pooled.sum().item()
    assert all(p.grad is not None for p in tower.parameters())
