"""A batch of 32k trains on a CPU in bounded memory, measured from outside."""

import subprocess
import sys

import pytest

N = 32_768
LIMIT_BYTES = 2 << 30

# Prints the growth of the peak, in bytes, over a process that has made its inputs and run once.
CODE = """
import resource, sys
import torch
from siglip2_kernels import sigmoid_loss
torch.set_num_threads(1)
N, D = int(sys.argv[1]), int(sys.argv[2])
features = [torch.randn(N, D, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
scalars = [torch.tensor(x, requires_grad=True) for x in (2.3026, -10.0)]
few = [x.detach()[:64].requires_grad_() for x in features]
sigmoid_loss(*few, *scalars, normalize=True).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
sigmoid_loss(*features, *scalars, normalize=True).backward()
assert all(x.grad.isfinite().all() for x in features)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_32k_batch_trains_in_less_than_2_gib():
    args = [sys.executable, "-c", CODE, str(N), "64"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown < LIMIT_BYTES
    # Inputs and gradients grow with D, which is larger in a model; what grows with N^2 does not.
    assert grown < N * N // 4, f"{grown >> 20} MiB: a quarter of a byte for each pair"
