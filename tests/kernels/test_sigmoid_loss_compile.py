import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.backend import INTERPRET  # noqa: E402
from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels.sigmoid_loss import _triton  # noqa: E402

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# What each launch passes; the other pointers are None.
OUTPUTS = {"grad": ("g", "totals"), "loss": ("totals",), "sums": ("rows", "columns")}
OPTIONAL = ("img_ids", "txt_ids", "img_weight", "txt_weight", "g", "totals", "rows", "columns")


# (mode, capability) -> bytes a thread; evaluation on Ampere, where two stages would avoid it.
SPILLS = {("loss", 80): 24}


def report(dtype, capability, mode, D=768, weighted=False):
    tile = _triton.config(dtype, divmod(capability, 10))
    passed = OUTPUTS[mode]
    if weighted:
        passed += ("img_ids", "txt_ids", "img_weight", "txt_weight")
    types = {name: "*fp32" for name in OPTIONAL if name in passed}
    types |= {name: "*i64" for name in ("img_ids", "txt_ids") if name in passed}
    types |= dict.fromkeys(("img", "txt"), POINTER[dtype]) | {"log_scale": "*fp32", "bias": "*fp32"}
    if "g" in passed:
        types["g"] = POINTER[dtype]
    pointers = {f"{name}_ptr": type for name, type in types.items()}
    sizes = dict.fromkeys(("B", "M", "first_row", "stride_img", "stride_txt", "stride_g"), "i32")
    constants = {"D": D, "BB": tile.BB, "BM": tile.BM, "BD": tile.BD}
    constants |= {"GROUP": _triton.GROUP, "LIFT": 2.0**15 if dtype is torch.float16 else 1.0}
    constants |= {f"{name}_ptr": None for name in OPTIONAL if name not in passed}
    return compile_report(
        _triton._tile_kernel,
        pointers | sizes,
        constants,
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=[*pointers, "M", "stride_img", "stride_txt", "stride_g"],
    )


def check(built, dtype, capability, spill_bytes=0):
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    assert built.spill_bytes <= spill_bytes
    if dtype is torch.float32:
        # Tensor cores would round float32 inputs to TF32.
        assert built.mma == {}
    else:
        assert list(built.mma) == [TENSOR_CORE[capability]]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("mode", OUTPUTS)
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_builds_without_spills_on_tensor_cores(dtype, mode, capability):
    half = dtype is not torch.float32
    spill_bytes = SPILLS.get((mode, capability), 0) if half else 0
    check(report(dtype, capability, mode), dtype, capability, spill_bytes)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("D", [1152, 72])
def test_ids_weights_and_odd_widths_fit_as_well(D, capability):
    built = report(torch.bfloat16, capability, "grad", D=D, weighted=True)
    check(built, torch.bfloat16, capability)


def test_report_sees_the_spills_of_a_tile_that_is_too_large(monkeypatch):
    monkeypatch.setattr(_triton, "WIDE", _triton.WIDE._replace(BM=256))
    assert report(torch.bfloat16, 90, "grad").spill_bytes > 0


def test_report_is_not_for_the_interpreter(monkeypatch):
    assert not INTERPRET
    monkeypatch.setattr("siglip2_kernels._core.compile_report.INTERPRET", True)
    with pytest.raises(RuntimeError, match="not compiled under TRITON_INTERPRET=1; unset it"):
        report(torch.bfloat16, 90, "loss")
