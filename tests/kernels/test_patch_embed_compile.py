import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels.patch_embed import _triton  # noqa: E402

TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}

EXTRAS = {"plain": 0, "posemb": 1, "masked": 3}  # optional tensors


def report(dtype, patches, D, capability, extras):
    tile = _triton.config(dtype, divmod(capability, 10), patches == "*u8", extras == "masked")
    types = {"patches_ptr": patches, "weight_ptr": POINTER[dtype], "bias_ptr": "*fp32"}
    types |= {"out_ptr": POINTER[dtype], "T": "i32"}
    optional = {"posemb_ptr": POINTER[dtype], "mask_ptr": "*u8", "mask_token_ptr": "*fp32"}
    types |= dict(list(optional.items())[: EXTRAS[extras]])
    constants = dict.fromkeys(optional.keys() - types.keys())
    constants |= {"D": D, "K": 768, "BT": tile.BT, "BD": tile.BD, "BK": tile.BK}
    return compile_report(
        _triton._fwd_kernel,
        types,
        constants | {"GROUP": _triton.GROUP},
        capability=capability,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=[name for name in types if name.endswith("_ptr")],
    )


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("patches", ["*u8", "same"])
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_builds_without_spills_on_tensor_cores(dtype, patches, extras, capability):
    if patches == "same" or dtype is torch.float32:  # float32: bytes are widened before
        patches = POINTER[dtype]
    built = report(dtype, patches, 1152, capability, extras)
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    # The epilogue of the fastest tile of an H100 keeps a few words on the stack, off the loop.
    is_widest = (capability, extras, patches) == (90, "posemb", "*u8")
    assert built.spill_bytes <= (32 if is_widest else 0)
    assert list(built.mma) == ([] if dtype is torch.float32 else [TENSOR_CORE[capability]])
