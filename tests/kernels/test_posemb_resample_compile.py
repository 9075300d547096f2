import pytest

pytestmark = pytest.mark.aot
triton = pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels.posemb_resample import _triton  # noqa: E402

POINTERS = {"grid_ptr": "*i32", "first_ptr": "*i64"}


def report(which, D, capability, dtype):
    sizes = {"D": D, "BD": _triton._block_d(D), "BG": 16}
    if which == "fwd":
        kernel, sizes = _triton._fwd_kernel, sizes | {"BT": _triton.BT}
        types = {"table_ptr": "*fp32", "image_ptr": "*i32", "out_ptr": dtype, "T": "i32"}
    else:
        kernel, sizes = _triton._bwd_kernel, sizes | {"BY": _triton.BY, "BX": _triton.BX}
        types = {"dout_ptr": dtype, "part_ptr": "*fp32", "B": "i32", "images": "i32"}
    types |= POINTERS | {"G": "i32"}
    return compile_report(
        kernel,
        types,
        sizes,
        capability=capability,
        num_warps={"fwd": _triton.FWD_WARPS, "bwd": _triton.BWD_WARPS}[which],
        num_stages=3,
        aligned=[name for name in types if name.endswith("_ptr")],
    )


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("D", [768, 1152])
@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_builds_without_spills(which, D, dtype, capability):
    built = report(which, D, capability, dtype)
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    assert built.spill_bytes == 0
