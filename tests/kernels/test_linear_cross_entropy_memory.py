import subprocess
import sys

import pytest
import torch
from head_inputs import OPTIONS, make_head, make_target
from torch.utils._python_dispatch import TorchDispatchMode

from siglip2_kernels import linear_cross_entropy
from siglip2_kernels.linear_cross_entropy import _chunked, reference

# Prints the growth of the peak, in bytes, over a process that has made its inputs and run once.
CODE = """
import resource, sys
import torch
from siglip2_kernels import linear_cross_entropy
torch.set_num_threads(1)
T, V, D = (int(x) for x in sys.argv[1:])
x = torch.empty(T, D).normal_().requires_grad_()
weight = torch.empty(V, D).normal_(std=D**-0.5).requires_grad_()
target = torch.randint(0, V, (T,))
few = weight.detach()[:64].requires_grad_()
linear_cross_entropy(x.detach(), few, target % 64, chunk_tokens=8).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
linear_cross_entropy(x, weight, target).backward()
assert x.grad.isfinite().all() and weight.grad.isfinite().all()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_256k_words_train_on_a_cpu_in_a_quarter_of_their_logits():
    T, V, D = 2048, 256_000, 64
    args = [sys.executable, "-c", CODE, str(T), str(V), str(D)]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    # Float32 logits, of which eager holds three at a time, are 2 GiB. Gradients of the weight, kept
    # and returned, are no more than 125 MiB.
    assert grown < T * V * 4 // 4, f"{grown >> 20} MiB"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_memory_does_not_grow_with_tokens_times_words(reduction):
    def saved_bytes(T, V):
        x, weight, _ = make_head(T, V, 16, torch.bfloat16)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            linear_cross_entropy(x, weight, make_target(T, V), reduction=reduction)
        return sum(sizes)

    for T, V in ((64, 4096), (1024, 64)):
        # Float32 gradients, or 16-bit inputs.
        assert saved_bytes(T, V) <= (4 if reduction == "mean" else 2) * 16 * (T + V) + 100


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_chunked_never_holds_more_than_a_chunk_of_logits(options):
    # The mode cannot look inside a registered op, so the backend is called as the op calls it.
    x, weight, bias = (t.detach() for t in make_head(500, 700, 16, torch.float32))
    target, options = make_target(500, 700).clamp(min=0), {"softcap": None} | options
    named = [options.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap")]
    with LargestTensor() as chunked:
        _chunked.fwd(x, weight, target, bias, torch.ones(500), *named, 40, *(True,) * 4)
    with LargestTensor() as eager:
        reference.token_terms(x, weight, target, bias=bias, **options)
    assert (chunked.elements, eager.elements) == (40 * 700, 500 * 700)


def test_a_float32_weight_is_never_copied_whole(monkeypatch):
    monkeypatch.setattr(_chunked, "BLOCK", 50)
    x, weight, _ = (t.detach() for t in make_head(8, 700, 16, torch.bfloat16))
    weight, target, rows = weight.float(), make_target(8, 700).clamp(min=0), torch.ones(8)
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                copied.append(out.numel())
            return out

    with Copies():
        _chunked.fwd(x, weight, target, None, rows, 0.0, 0.0, None, None, True, True, False, False)
    assert max(copied) == 50 * 16


@pytest.mark.parametrize(
    ("learned", "products"), [((), 1), ((2,), 1), ((0,), 2), ((1,), 2), ((0, 1, 2), 3)]
)
def test_only_the_products_that_are_needed_run(learned, products, monkeypatch):
    calls = []
    for name in ("mm_f32", "addmm_f32_"):
        real = getattr(_chunked, name)
        counted = lambda *a, real=real, **k: calls.append(1) or real(*a, **k)
        monkeypatch.setattr(_chunked, name, counted)
    inputs = [t.detach() for t in make_head(8, 9, 16, torch.float32)]
    for i in learned:
        inputs[i].requires_grad_()
    run = lambda: linear_cross_entropy(*inputs[:2], make_target(8, 9), bias=inputs[2])
    run()
    assert len(calls) == products
    with torch.no_grad():
        run()
    assert len(calls) == products + 1
