"""Every shipped configuration, compiled for GPUs that are not here."""

import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core import tile_product  # noqa: E402
from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels._core.matmul import unit_scale  # noqa: E402
from siglip2_kernels.linear_cross_entropy import _cublas, _exp_tile, _triton  # noqa: E402

POINTER = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TARGET, SUMS = {"target_ptr": "*i64"}, {"sums_ptr": "*fp32", "offset_ptr": "*fp32"}
MAXES, FLAGS = {"maxes_ptr": "*fp32"}, {"flags_ptr": "*i32"}
# What each launch passes; the other pointers are None.
LAUNCHES = {
    "loss": TARGET | SUMS,
    "grad": TARGET | SUMS | {"e": None},
    "accuracy": TARGET | SUMS | MAXES,
    "grad-accuracy": TARGET | SUMS | MAXES | {"e": None},
    "again-maxes": TARGET | MAXES | FLAGS,
    "again": TARGET | SUMS | FLAGS | {"e": None},
    "lifted": {"offset_ptr": "*fp32", "e": None},
}
OPTIONAL = {"bias_ptr", "target_ptr", "offset_ptr", "flags_ptr", "e", "sums_ptr", "maxes_ptr"}
SIZES = ("T", "V", "stride_x", "stride_w", "stride_e")


def tile_report(
    dtype, capability, launch, *, D=768, bias=False, softcap=False, tma=None, tile=None
):
    major_minor = divmod(capability, 10)
    tma = tile_product.has_tma(dtype, major_minor) if tma is None else tma
    types = dict(LAUNCHES[launch])
    options = {"has_bias": bias, "has_softcap": softcap, "reads_by_tma": tma}
    tile = tile or _triton.config(dtype, major_minor, **options)
    blocks = {"x": (tile.BT, tile.BD), "weight": (tile.BV, tile.BD)}
    if "e" in types:
        blocks["e"] = tile.BT, tile.BV // tile.pieces
    name = POINTER[dtype]
    for matrix, (rows, columns) in blocks.items():
        types[matrix] = f"tensordesc<{name}[{rows}, {columns}]>" if tma else f"*{name}"
    if bias:
        types["bias_ptr"] = "*fp32"
    constants = {"D": D, "BT": tile.BT, "BV": tile.BV, "BD": tile.BD, "PIECES": tile.pieces}
    constants |= {"GROUP": _triton.GROUP, "HAS_SOFTCAP": softcap, "HAS_TMA": tma}
    constants["FLATTEN"] = tile.is_flat and "flags_ptr" not in types
    pointers = [n for n, type in types.items() if type.startswith("*") and n != "target_ptr"]
    return compile_report(
        _exp_tile._exp_tile_kernel,
        types | dict.fromkeys(SIZES, "i32") | {"softcap": "fp32"},
        constants | dict.fromkeys(OPTIONAL - types.keys()),
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
        aligned=[*pointers, *SIZES[2:]],
    )


def check(built, dtype, capability, spill_bytes=0):
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    assert built.spill_bytes <= spill_bytes
    if dtype is torch.float32:
        # Tensor cores would round float32 inputs to TF32.
        assert built.mma == {}
    else:
        assert list(built.mma) == [TENSOR_CORE[capability]]


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"bias": True, "softcap": True}], ids=["plain", "bias", "full"]
)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_tiles_build_without_spills_on_tensor_cores(dtype, launch, capability, options):
    # Float32 sums in two levels; the guard's launches find work only where a target is 71 nats low,
    # and float32 goes to the library unless asked for by name.
    is_rare = dtype is torch.float32 and launch.startswith("again") and capability == 90
    built = tile_report(dtype, capability, launch, **options)
    check(built, dtype, capability, spill_bytes=8 if is_rare else 0)


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": True}], ids=["plain", "full"])
@pytest.mark.parametrize("launch", ["grad", "grad-accuracy", "again"])
def test_tiles_fit_the_shared_memory_of_consumer_gpus(launch, options):
    check(tile_report(torch.bfloat16, 89, launch, **options), torch.bfloat16, 89)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("D", [1536, 1152, 72])
@pytest.mark.parametrize("bias", [False, True])
def test_other_widths_fit_as_well(bias, D, capability):
    built = tile_report(torch.bfloat16, capability, "grad-accuracy", D=D, bias=bias)
    check(built, torch.bfloat16, capability)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("D", [772, 33])
def test_rows_without_descriptors_are_read_by_pointers(D, capability):
    built = tile_report(torch.bfloat16, capability, "grad", D=D, tma=False)
    check(built, torch.bfloat16, capability)
    assert not {"UTMALDG", "UTMASTG"} & built.accesses.keys()


@pytest.mark.parametrize("capability", [90, 100])
def test_descriptors_move_tiles_by_the_bulk_copy_engine(capability):
    assert {"UTMALDG", "UTMASTG"} <= tile_report(torch.bfloat16, capability, "grad").accesses.keys()


@pytest.mark.parametrize("launch", ["grad", "grad-accuracy"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_as_many_blocks_share_a_multiprocessor_as_the_table_says(capability, launch):
    tile = _triton.config(torch.bfloat16, divmod(capability, 10))
    built = tile_report(torch.bfloat16, capability, launch)
    assert built.registers * 32 * tile.num_warps * tile.blocks <= 65536
    assert built.shared_bytes * tile.blocks <= SHARED_BYTES_LIMIT[capability]


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("writes_g", [False, True], ids=["loss", "grad"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_the_row_kernel_builds_without_spills(dtype, capability, writes_g, full):
    types = {"z_ptr": "*fp32", "target_ptr": "*i64", "row_weight_ptr": "*fp32"}
    types |= {"losses_ptr": "*fp32", "lse_ptr": "*fp32"}
    if writes_g:
        types["g_ptr"] = f"*{POINTER[dtype]}"
    if full:
        types |= {"bias_ptr": "*fp32", "is_best_ptr": "*u8"}
    constants = {"HAS_SMOOTHING": full, "HAS_SOFTCAP": full, "BV": _cublas.COLUMNS}
    constants["LIFT"] = unit_scale(dtype)
    absent = {"bias_ptr", "is_best_ptr", "g_ptr"} - types.keys()
    numbers = dict.fromkeys(("label_smoothing", "z_loss", "softcap"), "fp32")
    built = compile_report(
        _cublas._row_kernel,
        types | dict.fromkeys(("V", "stride_z", "stride_g"), "i32") | numbers,
        constants | dict.fromkeys(absent),
        capability=capability,
        num_warps=_cublas.NUM_WARPS,
        num_stages=3,
        aligned=[n for n in ("z_ptr", "g_ptr", "bias_ptr") if n in types]
        + ["stride_z", "stride_g"],
    )
    assert built.spill_bytes == 0
    assert built.mma == {}


def test_report_sees_the_spills_of_a_tile_that_is_too_large():
    tile = _triton.HOPPER._replace(BV=256, pieces=2, num_warps=4, blocks=1)
    assert tile_report(torch.bfloat16, 90, "grad", tile=tile).spill_bytes > 0
