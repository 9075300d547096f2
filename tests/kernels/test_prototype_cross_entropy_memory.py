import subprocess
import sys

import pytest
import torch
from prototype_inputs import TEMPS, make_options, make_prototypes
from torch.utils._python_dispatch import TorchDispatchMode

from siglip2_kernels import prototype_cross_entropy, sinkhorn_bias
from siglip2_kernels.prototype_cross_entropy import _chunked, reference

# Prints the growth of the peak, in bytes, over a process that has made its inputs and run once.
CODE = """
import resource, sys
import torch
from siglip2_kernels import prototype_cross_entropy, sinkhorn_bias
torch.set_num_threads(1)
T, K, D = (int(x) for x in sys.argv[1:])
rows = lambda n: torch.nn.functional.normalize(torch.empty(n, D).normal_(), dim=1)
student, teacher = rows(T).requires_grad_(), rows(T)
weight, teacher_weight = rows(K).requires_grad_(), rows(K)
temps = {"student_temp": 0.1, "teacher_temp": 0.04}
def run(*inputs):
    bias = sinkhorn_bias(*inputs[2:], teacher_temp=0.04)
    prototype_cross_entropy(*inputs, **temps, teacher_bias=bias).backward()
run(student[:8].detach(), weight.detach()[:64].requires_grad_(), teacher[:8], teacher_weight[:64])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
run(student, weight, teacher, teacher_weight)
assert student.grad.isfinite().all() and weight.grad.isfinite().all()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_65k_prototypes_train_on_a_cpu_without_their_logits():
    T, K, D = 2048, 65_536, 32
    args = [sys.executable, "-c", CODE, str(T), str(K), str(D)]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    # Float32 logits of one side, of which eager holds several on both, are 512 MiB. Ours: three
    # chunks of 64 MiB and the weight's gradients.
    assert grown < T * K * 4 * 3 // 4, f"{grown >> 20} MiB"


@pytest.mark.parametrize("option", ["plain", "normed"])
def test_saved_memory_does_not_grow_with_tokens_times_prototypes(option):
    def saved_bytes(T, K):
        inputs = make_prototypes(T, K, 16, torch.bfloat16)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            prototype_cross_entropy(*inputs, **TEMPS, **make_options(T, K)[option])
        return sum(sizes)

    for T, K in ((64, 4096), (1024, 64)):
        # Float32 gradients, and the 16-bit weight itself where its rows were normalised.
        weight = 2 * 16 * K if option == "normed" else 0
        assert saved_bytes(T, K) <= 4 * 16 * (T + K) + weight + 100


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


def test_chunked_never_holds_more_than_two_chunks_of_logits(monkeypatch):
    # The mode cannot look inside a registered op, so the backend is called as the op calls it.
    inputs = [t.detach() for t in make_prototypes(500, 700, 16, torch.float32)]
    scales = torch.tensor(10.0), torch.tensor(25.0)
    with LargestTensor() as chunked:
        _chunked.fwd(*inputs, None, None, torch.ones(500), None, *scales, 40, True, True)
    with LargestTensor() as eager:
        reference.prototype_cross_entropy(*inputs, **TEMPS)
    assert (chunked.elements, eager.elements) == (2 * 40 * 700, 500 * 700)
    monkeypatch.setattr(_chunked, "MAX_ELEMENTS", {"cpu": 128 * 700})
    with LargestTensor() as lse:
        _chunked.lse(*inputs[2:], torch.zeros(700), scales[1])
        _chunked.lse(*inputs[:1:-1], torch.zeros(500), scales[1])
    assert lse.elements == 128 * 700


@pytest.mark.interpreter
def test_triton_allocates_nothing_of_tokens_times_prototypes():
    from siglip2_kernels.prototype_cross_entropy import _triton

    T, K, D = 400, 700, 16
    inputs = [t.detach() for t in make_prototypes(T, K, D, torch.float16)]
    scales = torch.tensor(10.0), torch.tensor(25.0)
    with LargestTensor() as triton:
        _triton.fwd(*inputs, None, None, torch.ones(T), None, *scales, None, True, True)
        _triton.lse(*inputs[2:], torch.zeros(K), scales[1])
        _triton.lse(*inputs[:1:-1], torch.zeros(T), scales[1])
    # The sums of all parts, or the copies and gradients of the weight.
    assert triton.elements <= 16 * K * D < T * K


def test_sinkhorn_keeps_no_graph():
    *_, teacher, weight = make_prototypes(30, 20, 16, torch.float32)
    bias = sinkhorn_bias(teacher.requires_grad_(), weight.requires_grad_(), teacher_temp=0.04)
    assert not bias.requires_grad
