"""A step over compiled towers and heads: no broken graph, the eager numbers."""

import torch
from self_distillation.stage_case import images, make, prepare, trained
from torch._dynamo.testing import CompileCounterWithBackend


def step(tower, stage, num):
    prepared = prepare(tower, stage, images(num))
    stage.skip_update()
    losses = stage(tower, prepared).losses
    named = trained(tower, stage)
    grads = torch.autograd.grad(sum(losses.values()), named.values())
    return [*(x.detach() for x in losses.values()), *grads]


def test_compiled_modules_give_the_eager_numbers():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results, graphs = [], []
    for is_compiled in (False, True):
        tower, stage = make()
        if is_compiled:
            heads = [x for head in stage.heads.values() for x in (head.student, head.teacher)]
            for module in (tower, stage.teacher, *heads):
                module.compile(backend=counter, fullgraph=True)
        found = []
        for num in (3, 4, 5, 6):
            found += step(tower, stage, num)
            graphs.append(counter.frame_count)
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert graphs[-1] == graphs[-2]  # another number of images compiles nothing after the second
    torch._dynamo.reset()
