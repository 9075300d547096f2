import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels.map_pool import _triton  # noqa: E402

TENSOR_CORE = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOATS = {"fwd": ("s", "m", "lse"), "bwd": ("u", "s", "dm", "lse", "delta")}
OWN = {"fwd": ("x",), "bwd": ("x", "dx", "ds")}


def report(which, dtype, D, H, capability):
    kernel = {"fwd": _triton._fwd_kernel, "bwd": _triton._bwd_kernel}[which]
    types = {f"{name}_ptr": "*fp32" for name in FLOATS[which]}
    types |= {f"{name}_ptr": POINTER[dtype] for name in OWN[which]} | {"cu_ptr": "*i32"}
    return compile_report(
        kernel,
        types,
        _triton._sizes(torch.empty(H, D)),
        capability=capability,
        num_warps=_triton.NUM_WARPS,
        num_stages=_triton.NUM_STAGES,
        aligned=list(types),
    )


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("D", "H"), [(768, 12), (1152, 16)])
@pytest.mark.parametrize("dtype", POINTER, ids=str)
@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_builds_without_spills(which, dtype, D, H, capability):
    built = report(which, dtype, D, H, capability)
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    assert built.spill_bytes == 0
    if dtype is torch.float32:
        assert built.mma == {}  # no TF32
    else:
        assert built.mma
        assert set(built.mma) <= TENSOR_CORE[capability]
