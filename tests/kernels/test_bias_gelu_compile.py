import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import compile_report  # noqa: E402
from siglip2_kernels.bias_gelu import _triton  # noqa: E402

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
OWN = {"fwd": ("h", "y"), "bwd": ("dy", "h", "dh")}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("M", [3072, 4304])
@pytest.mark.parametrize("dtype", POINTER, ids=str)
@pytest.mark.parametrize("which", OWN)
def test_builds_without_spills_and_moves_16_bytes_a_thread(which, dtype, M, capability):
    kernel = {"fwd": _triton._fwd_kernel, "bwd": _triton._bwd_kernel}[which]
    types = {f"{name}_ptr": POINTER[dtype] for name in OWN[which]} | {"bias_ptr": "*fp32"}
    if which == "bwd":
        types["partial_ptr"] = "*fp32"
    tile = {"fwd": _triton.FWD, "bwd": _triton.BWD}[which]._asdict()
    num_warps = tile.pop("num_warps")
    built = compile_report(
        kernel,
        types | {"T": "i32"},
        tile | {"M": M},
        capability=capability,
        num_warps=num_warps,
        num_stages=3,
        aligned=list(types),
    )
    assert built.spill_bytes == 0
    assert built.registers <= (48 if which == "fwd" else 96)
    reads, writes = (1, 1) if which == "fwd" else (2, 1)
    assert built.accesses.get("LDG.128", 0) >= reads
    assert built.accesses.get("STG.128", 0) >= writes
