"""Gradients times a device scalar, rounded once."""

import pytest
import torch

from siglip2_kernels._core.scaled import scaled

SHAPES = [(0, 5), (1, 1), (3, 33), (64, 64), (100, 1152)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(shape, device, dtype=torch.float32):
    d = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return d.to(device), torch.tensor(0.3, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_is_the_float32_product_rounded_once(device, shape, dtype):
    d, scale = make(shape, device)
    out = scaled(d, scale, dtype)
    assert out.dtype is dtype
    assert torch.equal(out, (d * scale).to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_float32_product_rounded_once(shape):
    from siglip2_kernels._core import scaled_triton

    d, scale = make(shape, "cpu")
    out = torch.empty_like(d, dtype=torch.float16)
    scaled_triton.scaled(d, scale, out)
    assert torch.equal(out, (d * scale).half())


@pytest.mark.parametrize("device", DEVICES)
def test_float64_and_strided_rows(device):
    d, scale = make((40, 60), device, torch.float64)
    assert torch.equal(scaled(d, scale, torch.float64), d * scale)
    rows, scale = make((60, 40), device)
    assert torch.equal(scaled(rows.T, scale, torch.float16), (rows.T * scale).half())


@pytest.mark.parametrize("by_triton", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_opcheck(by_triton):
    args = make((3, 33), "cuda" if by_triton else "cpu")
    utils = ("test_schema", "test_faketensor")
    op = torch.ops.siglip2.scaled.default
    torch.library.opcheck(op, (*args, torch.float16, by_triton), test_utils=utils)


@pytest.mark.gpu
def test_a_new_number_of_elements_compiles_nothing():
    from siglip2_kernels._core import scaled_triton

    count = lambda: sum(
        len(caches[0]) for caches in scaled_triton._scaled_kernel.device_caches.values()
    )
    scaled(*make((160, 64), "cuda"), torch.bfloat16)
    before = count()
    for shape in SHAPES:
        scaled(*make(shape, "cuda"), torch.bfloat16)
    assert count() == before


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_whole_blocks_move_in_vectors(capability):
    pytest.importorskip("triton")
    from siglip2_kernels._core import scaled_triton
    from siglip2_kernels._core.compile_report import compile_report

    types = {"d_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32"}
    built = compile_report(
        scaled_triton._scaled_kernel,
        types,
        {"BLOCK": scaled_triton.BLOCK},
        capability=capability,
        num_warps=scaled_triton.NUM_WARPS,
        num_stages=3,
        aligned=["d_ptr", "out_ptr"],
    )
    assert built.spill_bytes == 0
    # 32 elements of a thread.
    assert built.accesses["LDG.128"] == 8
    stores = [built.accesses.get(name, 0) for name in ("STG.64", "STG.128")]
    assert sum(stores) >= 4
