"""Every shipped configuration, compiled for GPUs that are not here."""

import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels._core.matmul import unit_scale  # noqa: E402
from siglip2_kernels.sigmoid_loss import _cublas, _triton  # noqa: E402

POINTER = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# What each launch passes; the other pointers are None.
OUTPUTS = {
    "grad": ("g", "totals_ptr"),
    "loss": ("totals_ptr",),
    "sums": ("rows_ptr", "columns_ptr"),
}
IDS = ("img_ids_ptr", "txt_ids_ptr", "img_ignore_ids_ptr", "txt_ignore_ids_ptr")
WEIGHTS = ("img_weight_ptr", "txt_weight_ptr")
OPTIONAL = (*IDS, *WEIGHTS, "g", "totals_ptr", "rows_ptr", "columns_ptr")
ALIGNED = ("stride_img", "stride_txt", "stride_g")
SIZES = ("B", "M", "first_row", "stride_img", "stride_txt", "stride_g")


def optional(mode, full):
    """Types of the pointers that a launch passes, and None for the others."""
    types = dict.fromkeys(("totals_ptr", "rows_ptr", "columns_ptr"), "*fp32")
    types = {name: types[name] for name in types if name in OUTPUTS[mode]}
    if full:
        types |= dict.fromkeys(IDS, "*i64") | dict.fromkeys(WEIGHTS, "*fp32")
    return types


def tile_report(
    dtype, capability, mode, *, D=768, full=False, tma=None, tile=None, aligned=ALIGNED
):
    major_minor = divmod(capability, 10)
    tma = _triton.has_tma(dtype, major_minor) if tma is None else tma
    tile = tile or _triton.config(dtype, major_minor, is_plain=not full, reads_by_tma=tma)
    name = POINTER[dtype]
    types = {"scale_ptr": "*fp32", "bias_ptr": "*fp32"} | optional(mode, full)
    inputs = {"img": (tile.BT, tile.BD), "txt": (tile.BV, tile.BD)}
    if "g" in OUTPUTS[mode]:
        inputs["g"] = (tile.BT, tile.BV // tile.pieces)
    for matrix, block in inputs.items():
        types[matrix] = f"tensordesc<{name}[{block[0]}, {block[1]}]>" if tma else f"*{name}"
    constants = {"D": D, "BB": tile.BT, "BM": tile.BV, "BD": tile.BD, "PIECES": tile.pieces}
    constants |= {"GROUP": _triton.GROUP, "LIFT": unit_scale(dtype), "HAS_TMA": tma}
    constants |= {"FLATTEN": tile.is_flat}
    constants |= {name: None for name in OPTIONAL if name not in types}
    pointers = [name for name, type in types.items() if type.startswith("*")]
    return compile_report(
        _triton._tile_kernel,
        types | dict.fromkeys(SIZES, "i32"),
        constants,
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
        aligned=[*pointers, *aligned],
    )


def check(built, dtype, capability):
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    assert built.spill_bytes == 0
    if dtype is torch.float32:
        # Tensor cores would round float32 inputs to TF32.
        assert built.mma == {}
    else:
        assert list(built.mma) == [TENSOR_CORE[capability]]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("mode", OUTPUTS)
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_tiles_build_without_spills_on_tensor_cores(dtype, mode, capability):
    check(tile_report(dtype, capability, mode), dtype, capability)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "ids-and-weights"])
def test_tiles_fit_the_shared_memory_of_consumer_gpus(full):
    check(tile_report(torch.bfloat16, 89, "grad", full=full), torch.bfloat16, 89)


@pytest.mark.parametrize("mode", ["loss", "sums"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_ids_and_weights_fit_evaluation_too(capability, mode):
    check(tile_report(torch.bfloat16, capability, mode, full=True), torch.bfloat16, capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("D", [1536, 1152, 72])
def test_ids_weights_and_other_widths_fit_as_well(D, capability):
    built = tile_report(torch.bfloat16, capability, "grad", D=D, full=True)
    check(built, torch.bfloat16, capability)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(("D", "aligned"), [(772, ALIGNED), (33, ("stride_g",))])
def test_rows_without_descriptors_are_read_by_pointers(D, aligned, capability):
    built = tile_report(torch.bfloat16, capability, "grad", D=D, tma=False, aligned=aligned)
    check(built, torch.bfloat16, capability)
    assert not {"UTMALDG", "UTMASTG"} & built.accesses.keys()


@pytest.mark.parametrize("capability", [90, 100])
def test_descriptors_move_tiles_by_the_bulk_copy_engine(capability):
    accesses = tile_report(torch.bfloat16, capability, "grad").accesses
    assert {"UTMALDG", "UTMASTG"} <= accesses.keys()
    # Two scalars in, three sums out of each copy of the epilogue; no tile goes through threads.
    assert {name for name in accesses if not name.startswith("UTM")} == {"LDG.32", "STG.32"}


@pytest.mark.parametrize("capability", [90, 100])
def test_as_many_blocks_share_a_multiprocessor_as_the_table_says(capability):
    tile = _triton.config(torch.bfloat16, divmod(capability, 10))
    built = tile_report(torch.bfloat16, capability, "grad")
    assert built.registers * 32 * tile.num_warps * tile.blocks <= 65536
    assert built.shared_bytes * tile.blocks <= SHARED_BYTES_LIMIT[capability]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "ids-and-weights"])
@pytest.mark.parametrize("mode", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_elementwise_pass_builds_without_spills(dtype, mode, full, capability):
    types = {"x_ptr": f"*{POINTER[dtype]}", "scale_ptr": "*fp32", "bias_ptr": "*fp32"}
    types |= optional(mode, full)
    constants = {"ROWS": _cublas.ROWS, "COLUMNS": _cublas.COLUMNS, "LIFT": unit_scale(dtype)}
    constants |= {"WRITES_G": mode == "grad"}
    absent = (name for name in OPTIONAL if name != "g" and name not in types)
    built = compile_report(
        _cublas._pass_kernel,
        types | dict.fromkeys(("B", "M", "first_row", "stride_x"), "i32"),
        constants | dict.fromkeys(absent),
        capability=capability,
        num_warps=_cublas.NUM_WARPS,
        num_stages=1,
        aligned=[*types, "stride_x"],
    )
    assert built.spill_bytes == 0
    assert built.mma == {}
    # Eight columns of a thread: one access of 16 bytes in float16, two in float32.
    vectors = 8 * dtype.itemsize // 16
    assert built.accesses["LDG.128"] >= vectors
    assert built.accesses.get("STG.128", 0) == (vectors if mode == "grad" else 0)


def test_report_sees_the_spills_of_a_tile_that_is_too_large():
    tile = _triton.HOPPER._replace(BV=256, pieces=2, num_warps=4, blocks=1)
    assert tile_report(torch.bfloat16, 90, "grad", tile=tile).spill_bytes > 0
