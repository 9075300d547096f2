import pytest
import torch

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

from siglip2_kernels._core.compile_report import SHARED_BYTES_LIMIT, compile_report  # noqa: E402
from siglip2_kernels.varlen_attention import _backward_triton, _triton  # noqa: E402
from siglip2_kernels.varlen_attention.plan import tile_rows  # noqa: E402

TENSOR_CORE = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
OWN = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr"}
INDICES = {"cu_ptr", "cu_k_ptr", "tiles_ptr", "order_ptr"}
SIZES = {"B", "T", "S", "max_seqlen"}
H = 12
# Bytes a thread spills in the backward's loop: (capability, head width) -> both ways, causal.
SPILLS = {(80, 72): (32, 88), (80, 96): (8, 32), (90, 72): (0, 32), (90, 96): (32, 32)}


def report(kernel, config, dtype, E, capability, **constants):
    """As the launch has it: one packed qkv, no `used` rows, all pointers and strides aligned."""
    types = {}
    for name in kernel.arg_names:
        if name.startswith(("used", "lookahead")):
            constants[name] = None
        elif name.endswith("_ptr"):
            types[name] = POINTER[dtype] if name in OWN else "*fp32"
            types[name] = "*i32" if name in INDICES else types[name]
        elif name.startswith("stride") or name in SIZES:
            types[name] = "i32"
    constants |= _triton.sizes(E) | {"H": H, "BM": config.BM, "BN": config.BN}
    return compile_report(
        kernel,
        types | {"scale": "fp32"},
        constants,
        capability=capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=[name for name in types if name not in SIZES],
    )


def forward(dtype, E, length, capability, is_causal):
    config = _triton.fwd_config(dtype, E, length, length, capability // 10)
    split = tile_rows(length) // config.BM
    constants = {"IS_CAUSAL": is_causal, "IS_ONE_TILE": length <= config.BN, "SPLIT": split}
    return report(_triton._fwd_kernel, config, dtype, E, capability, **constants)


def backward(dtype, E, length, capability, is_causal):
    generation = capability // 10
    config = _triton.bwd_config(dtype, E, length, length, generation)
    is_one_tile = length <= _triton.most_in_one_tile(dtype, generation)
    kernel = _backward_triton.tile_kernel if is_one_tile else _backward_triton.loop_kernel
    constants = {"IS_CAUSAL": is_causal, "IS_ONE": True}
    return report(kernel, config, dtype, E, capability, **constants)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("length", [16, 64, 128, 256])
@pytest.mark.parametrize("E", [64, 72, 96])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("build", [forward, backward])
def test_bfloat16_builds_for_every_width_and_length(build, capability, E, length, is_causal):
    built = build(torch.bfloat16, E, length, capability, is_causal)
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    is_loop = length > _triton.most_in_one_tile(torch.bfloat16, capability // 10)
    listed = SPILLS.get((capability, E), (0, 0))[is_causal]
    spills = listed if is_loop and build is backward else 0
    assert built.spill_bytes <= spills
    assert built.mma
    assert set(built.mma) <= TENSOR_CORE[capability]
    if capability == 90 and length >= 64:
        assert built.mma.get("HGMMA")
    if capability == 100 and length >= 64:
        assert built.mma.get("UTCHMMA")


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("build", [forward, backward])
def test_other_dtypes_build(build, dtype, capability, length):
    built = build(dtype, 72, length, capability, False)
    assert built.shared_bytes <= SHARED_BYTES_LIMIT[capability]
    listed = SPILLS.get((capability, 72), (0, 0))[0] if dtype is torch.float16 else 0
    is_loop = build is backward and length == 256
    forward_of_ampere = 8 if dtype is torch.float32 and capability == 80 else 0
    assert built.spill_bytes <= (listed if is_loop else forward_of_ampere)
    assert bool(built.mma) == (dtype is torch.float16)  # float32: no TF32


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize(("E", "blocks"), [(64, 2), (72, 3), (96, 2), (128, 2)])
def test_forward_of_hopper_keeps_several_blocks_a_multiprocessor(E, blocks, is_causal):
    """64k registers a multiprocessor; 228 KiB of shared memory, of which a block costs one more."""
    config = _triton.fwd_config(torch.bfloat16, E, 256, 256, 9)
    built = forward(torch.bfloat16, E, 256, 90, is_causal)
    assert built.spill_bytes == 0
    assert built.mma.get("HGMMA")
    registers = -(-built.registers // 8) * 8 * config.num_warps * 32
    assert min(65_536 // registers, 228 * 1024 // (built.shared_bytes + 1024)) >= blocks


@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
def test_backward_of_few_queries_on_hopper_runs_two_blocks_a_multiprocessor(is_causal):
    config = _triton.bwd_config(torch.bfloat16, 64, 128, 256, 9)
    assert config.programs == 2
    built = report(
        _backward_triton.loop_kernel,
        config,
        torch.bfloat16,
        64,
        90,
        IS_CAUSAL=is_causal,
        IS_ONE=False,
    )
    assert built.spill_bytes == 0
    assert built.mma.get("HGMMA")
    registers = -(-built.registers // 8) * 8 * config.num_warps * 32
    assert min(65_536 // registers, 228 * 1024 // (built.shared_bytes + 1024)) >= 2
