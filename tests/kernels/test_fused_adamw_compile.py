"""Both kernels, compiled for GPUs that are not here."""

import pytest

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from siglip2_kernels._core.compile_report import compile_report  # noqa: E402
from siglip2_kernels.fused_adamw import _triton  # noqa: E402

TABLES = {"chunks_ptr": "*i32", "table_ptr": "*i64", "grads_ptr": "*i64", "scalars_ptr": "*fp32"}
# (teachers, copies, copies of teachers)
FORMS = {
    "adamw": (False, False, False),
    "teacher": (True, False, False),
    "copy": (False, True, False),
    "all": (True, True, True),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("form", FORMS)
def test_the_update_builds_without_spills_and_moves_16_bytes_a_thread(form, capability):
    has_teachers, has_copies, has_teacher_copies = FORMS[form]
    types = TABLES | {"found_inf_ptr": "*fp32"}
    constants = {
        "HAS_TEACHERS": has_teachers,
        "HAS_COPIES": has_copies,
        "HAS_TEACHER_COPIES": has_teacher_copies,
        "COPY": tl.bfloat16 if has_copies else None,
        "CHUNK": _triton.CHUNK,
        "BLOCK": _triton.BLOCK,
    }
    built = compile_report(
        _triton._update_kernel,
        types,
        constants,
        capability=capability,
        num_warps=_triton.NUM_WARPS,
        num_stages=3,
        aligned=list(types),
    )
    assert built.spill_bytes == 0
    assert built.registers <= 128  # two blocks share a multiprocessor
    # 8 elements a thread and round: two accesses of a float32 tensor, one of a 16-bit one
    assert built.accesses["LDG.128"] == 2 * (4 + has_teachers)
    assert built.accesses["STG.128"] == 2 * (3 + has_teachers) + has_copies + has_teacher_copies


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("in_memory", [False, True], ids=["numbers", "tensors"])
def test_the_scalars_build_without_spills(in_memory, capability):
    types = {"steps_ptr": "*i64", "scalars_ptr": "*fp32", "num_tensors": "i32"}
    types |= dict.fromkeys(("lr", "weight_decay"), "*fp32" if in_memory else "fp32")
    types |= {"momentum": "*fp64" if in_memory else "fp32"}
    types |= dict.fromkeys(("rest1", "rest2", "eps"), "fp32")
    optional = ("found_inf_ptr", "grad_scale_ptr", "clip_ptr")
    types |= dict.fromkeys(optional, "*fp32") if in_memory else {}
    flags = ("LR_IS_POINTER", "DECAY_IS_POINTER", "MOMENTUM_IS_POINTER")
    constants = dict.fromkeys(flags, in_memory) | {"ROWS": _triton.ROWS}
    constants |= {} if in_memory else dict.fromkeys(optional)
    built = compile_report(
        _triton._scalars_kernel, types, constants, capability=capability, num_warps=4, num_stages=3
    )
    assert built.spill_bytes == 0
