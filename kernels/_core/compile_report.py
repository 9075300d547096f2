"""What the compiler made of a Triton kernel for a GPU that need not be here."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backend import INTERPRET

# Most shared memory one block can have, in bytes (CUDA C programming guide, compute capabilities).
SHARED_BYTES_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Tensor-core instructions: Ampere and older warps, Hopper warp groups, Blackwell tensor memory.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
# Global loads and stores with the bits a thread moves, asynchronous copies, and bulk tensor copies.
_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS)\.E(?:\.\w+)*?(?:\.(64|128))?(?=\s)|\b(UTMALDG|UTMASTG)\b")
_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+)")


class CompileReport(NamedTuple):
    registers: int  # of a thread
    spill_bytes: int  # of a thread: its stack frame, which Triton uses for nothing else
    shared_bytes: int  # of a block
    mma: Mapping[str, int]  # tensor-core instructions in the machine code, by name
    accesses: Mapping[str, int]  # of global memory: LDG.128, STG.32, LDGSTS.128, UTMALDG...


def compile_report(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    aligned: Collection[str] = (),
) -> CompileReport:
    """Compile one specialisation ahead of time and read its machine code.

    Args:
        kernel: The `@triton.jit` function.
        signature: Each run-time argument's Triton type: "*bf16", "i32", "tensordesc<bf16[64,64]>".
        constants: Each other argument's value; None for an absent pointer.
        capability: 80, 89, 90 or 100.
        maxnreg: Most registers of a thread; None: what the compiler wants.
        aligned: Run-time arguments divisible by 16, as Triton finds them at a real launch.

    Triton's own cache keeps the binary, so a second call only disassembles it.

    Raises:
        RuntimeError: Under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    if INTERPRET:
        raise RuntimeError("kernels are not compiled under TRITON_INTERPRET=1; unset it")
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, code = _disassemble(binary.asm["cubin"])
    mma = Counter(match.group(1) for match in _TENSOR_CORE.finditer(code))
    accesses = Counter(bulk or f"{name}.{bits or 32}" for name, bits, bulk in _ACCESS.findall(code))
    return CompileReport(registers, stack, binary.metadata.shared, dict(mma), dict(accesses))


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and machine code, by the tools in Triton's wheel."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _run(os.path.join(tools, "cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(os.path.join(tools, "nvdisasm"), "--print-code", file.name)
    found = _RESOURCES.search(resources)
    assert found is not None, f"cuobjdump printed no resource usage: {resources!r}"
    return int(found.group(1)), int(found.group(2)), code


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
