"""Every shipped configuration, compiled for GPUs that are not here."""

import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels._core.tile_product import has_tma  # noqa: E402
from siglip2_kernels.prototype_cross_entropy import _sweep, _triton  # noqa: E402

POINTER = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HALF = (torch.bfloat16, torch.float16)
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
LAUNCHES = ("lse", "shared", "separate", "dweight")
SIZES = {
    "softmax": ("R", "N", "blocks", "stride_r", "stride_c", "stride_v"),
    "dweight": ("K", "T", "S", "stride_ws", "stride_wt", "stride_zs", "stride_zt", "stride_v"),
}
VECTORS = (
    *("student_lse_ptr", "teacher_lse_ptr", "row_weight_ptr"),
    *("student_scale_ptr", "teacher_scale_ptr", "dweight_ptr"),
)


def report(launch, dtype, capability, *, D=256, full=True, tma=None, tile=None):
    """`full`: with a bias, factors and counts."""
    major_minor = divmod(capability, 10)
    tile = tile or _triton.config(D, dtype, major_minor, launch)
    tma = has_tma(dtype, major_minor) if tma is None else tma
    BD = max(1 << (D - 1).bit_length(), 16)
    heights, types = {}, {}
    if launch == "dweight":
        kernel, sizes = _sweep._dweight_kernel, SIZES["dweight"]
        heights |= {"student_weight": tile.BR, "teacher_weight": tile.BR}
        heights |= {"student": tile.BN, "teacher": tile.BN, "teacher_values": tile.BN}
        types |= dict.fromkeys(VECTORS, "*fp32")
        optional = {"bias_ptr": "*fp32", "teacher_factor_ptr": "*fp32"}
        optional |= {"student_count_ptr": "*i32", "teacher_count_ptr": "*i32"}
        lift = 15.0 if dtype is torch.float16 else 0.0
        constants = {"LOG2_LIFT": lift, "BK": tile.BR}
    else:
        kernel, sizes = _sweep._softmax_kernel, SIZES["softmax"]
        heights |= {"rows": tile.BR, "columns": tile.BN}
        types |= dict.fromkeys(("scale_ptr", "max_ptr", "sum_ptr"), "*fp32")
        optional = {"bias_ptr": "*fp32", "count_ptr": "*i32"}
        constants = {"BR": tile.BR, "HAS_TAIL": full or launch == "lse"}
        constants |= {"IS_ROUNDED": launch == "separate", "values": None, "acc_ptr": None}
        if launch != "lse":
            types["acc_ptr"] = "*fp32"
        if launch == "separate":
            heights["values"] = tile.BN
    name = POINTER[dtype]
    for matrix, height in heights.items():
        types[matrix] = f"tensordesc<{name}[{height}, {BD}]>" if tma else f"*{name}"
    types |= optional if full else {}
    constants |= {"D": D, "BN": tile.BN, "BD": BD, "HAS_TMA": tma}
    constants |= dict.fromkeys(optional) | dict.fromkeys(("values", "acc_ptr"))
    pointers = [n for n, type in types.items() if type.startswith("*")]
    types |= dict.fromkeys(sizes, "i32")
    names = set(kernel.arg_names)
    return compile_report(
        kernel,
        types,
        {n: value for n, value in constants.items() if n in names and n not in types},
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=[*pointers, *(n for n in sizes if n.startswith("stride"))],
    )


def check(built, dtype, capability):
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    assert built.spill_bytes == 0
    if dtype is torch.float32:
        # Tensor cores would round float32 inputs to TF32.
        assert built.mma == {}
    else:
        assert list(built.mma) == [TENSOR_CORE[capability]]


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sweeps_build_without_spills_on_tensor_cores(dtype, launch, capability, full):
    check(report(launch, dtype, capability, full=full), dtype, capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("D", [512, 384, 64])
def test_other_bottlenecks_fit_as_well(D, launch, capability):
    check(report(launch, torch.bfloat16, capability, D=D), torch.bfloat16, capability)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("D", [256, 512])
def test_sweeps_fit_the_shared_memory_of_consumer_gpus(D, launch):
    check(report(launch, torch.bfloat16, 89, D=D), torch.bfloat16, 89)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_float32_stays_off_tensor_cores(launch):
    check(report(launch, torch.float32, 90, D=64), torch.float32, 90)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_rows_without_descriptors_are_read_by_pointers(launch, capability):
    built = report(launch, torch.bfloat16, capability, D=36, tma=False)
    check(built, torch.bfloat16, capability)
    assert not {"UTMALDG", "UTMASTG"} & built.accesses.keys()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_descriptors_move_blocks_by_the_bulk_copy_engine(launch):
    assert "UTMALDG" in report(launch, torch.bfloat16, 90).accesses


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("D", [256, 384])
def test_merges_and_view_sums_build_without_spills(D, capability):
    constants = {"D": D, "BD": 1 << (D - 1).bit_length()}
    options = {"capability": capability, "num_warps": 2, "num_stages": 3}
    names = ("acc_ptr", "max_ptr", "sum_ptr", "out_ptr", "lse_ptr")
    types = dict.fromkeys(names, "*fp32") | {"R": "i32", "splits": "i32"}
    merge = compile_report(_sweep._merge_kernel, types, constants, aligned=names, **options)
    types = {"student_ptr": "*bf16", "row_weight_ptr": "*fp32", "order_ptr": "*i64"}
    types |= {"starts_ptr": "*i64", "out_ptr": "*bf16", "stride_z": "i32"}
    sums = compile_report(_sweep._view_sum_kernel, types, constants, aligned=types, **options)
    for built in (merge, sums):
        assert built.spill_bytes == 0
        assert built.mma == {}


def test_report_sees_the_spills_of_a_tile_that_is_too_large():
    tile = _triton.Sweep(128, 128, 4, 1)
    assert report("separate", torch.bfloat16, 90, tile=tile).spill_bytes > 0
