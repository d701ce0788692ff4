"""Compiling the Triton kernels for GPUs that are not there, and reading what came out.

Each op's `triton.py` names its main sizes in `ahead_of_time()`; the launches of its forward and backward on them are
recorded (`zoo.ops.gpu`), compiled as Triton would at the launch, and the machine code is read: registers, stack,
spills, shared memory, tensor-core instructions. The rows go to `evals/results/kernels_aot.csv`, where dispatch looks
up on which GPUs an op had better run its PyTorch form.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.errors import TritonError
from triton.runtime.jit import JITFunction, create_function_from_signature

from zoo.ops.gpu import Launch, record_launches

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}

# Bytes a program may take for itself: any of these GPUs has them, most of them more than once.
SHARED_LIMIT = {"cuda": 100 * 1024, "hip": 64 * 1024}

_TENSOR_CORE = {
    "cuda": re.compile(r"\b(UTC\w*MMA|HGMMA|HMMA)\b"),  # tcgen05 of sm_100, wgmma of sm_90, mma of all
    "hip": re.compile(r"\b(v_mfma)_"),
}


class Row(NamedTuple):
    """One kernel, compiled for one GPU.

    Args:
        op, kernel: the op and its kernel.
        size: the name of the op's main size.
        target: the GPU's architecture.
        constants: the kernel's `tl.constexpr` parameters, as `CHUNK=32 BLOCK=64`.
        absent: its arguments that are None in the launch.
        warps, stages: those of the launch.
        source: digest of the kernel's source and of what it calls: another one wants another row.
        registers: of a thread.
        stack: bytes of a thread that lie in slow memory.
        spills: loads and stores of such bytes in the machine code (NVIDIA), registers spilled (AMD).
        shared: bytes of shared memory of a program.
        products: whether there is a `tl.dot` in it.
        tensor_core: how many tensor-core instructions there are.
        instruction: which: `UTC...MMA` (tcgen05), `HGMMA` (wgmma), `HMMA`, `v_mfma`.
        verdict: the form that the op should run on this GPU, `triton` or `chunked`.
        why: the reason for `chunked`.
        triton: version of the compiler.
    """

    op: str
    kernel: str
    size: str
    target: str
    constants: str
    absent: str
    warps: int
    stages: int
    source: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    products: bool = False
    tensor_core: int = 0
    instruction: str = ""
    verdict: str = ""
    why: str = ""
    triton: str = triton.__version__


def ops_with_triton() -> list[str]:
    """The ops that have Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


def compile_all(ops: Iterable[str] | None = None, targets: Iterable[str] = tuple(TARGETS)) -> list[Row]:
    """Compile the kernels of ops, all of them by default, for GPUs. It takes minutes, and tells stderr where it is.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where Triton has no compiler.
    """
    targets = list(targets)
    return sorted(row for op in ops or ops_with_triton() for target in targets for row in compile_op(op, target))


def compile_op(op: str, target: str) -> list[Row]:
    """Compile the kernels of one op at its main sizes for one GPU.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where Triton has no compiler.
    """
    rows = {}
    for row, launch in _list_launches(op, target):
        row = _compile(row, launch)
        print(*row, sep="  ", file=sys.stderr, flush=True)
        rows[row] = None  # a kernel that is launched twice in the same way counts once
    return list(rows)


def list_kernels(op: str, target: str) -> set[Row]:
    """The rows that `compile_op` would make, without what only a compiler knows: in a moment.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where Triton has no compiler.
    """
    return {row for row, _ in _list_launches(op, target)}


def _list_launches(op: str, target: str) -> Iterator[tuple[Row, Launch]]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, none can be compiled; unset it")
    module = importlib.import_module(f"zoo.ops.{op}.triton")
    for size, inputs in module.ahead_of_time().items():
        with record_launches(target) as launches:
            outputs = module.forward(*inputs)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            module.backward([torch.empty_like(x) for x in outputs], outputs, *inputs)
        for launch in launches:
            row = Row(
                op=op,
                kernel=launch.kernel.__name__.lstrip("_"),
                size=size,
                target=target,
                constants=" ".join(f"{name}={value}" for name, value in launch.constants.items()),
                absent=" ".join(_absent(launch)),
                warps=launch.warps,
                stages=launch.stages,
                source=launch.kernel.cache_key[:12],
            )
            yield row, launch


def _absent(launch: Launch) -> list[str]:
    names = launch.kernel.arg_names[: len(launch.arguments)]
    return [name for name, x in zip(names, launch.arguments, strict=True) if x is None]


class _Reading(NamedTuple):
    """What the machine code of a kernel says."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_core: int = 0
    instruction: str = ""
    has_dot: bool = False


def _compile(row: Row, launch: Launch) -> Row:
    gpu = TARGETS[row.target]
    try:
        reading = _read(triton.compile(*_compiler_input(launch, gpu)), gpu)
        why = _fault(reading, gpu)
    except (TritonError, RuntimeError) as error:  # it does not compile for this GPU: the table says so
        reading, why = _Reading(), " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return row._replace(
        registers=reading.registers,
        stack=reading.stack,
        spills=reading.spills,
        shared=reading.shared,
        products=reading.has_dot,
        tensor_core=reading.tensor_core,
        instruction=reading.instruction,
        verdict="chunked" if why else "triton",
        why=why,
    )


def _compiler_input(launch: Launch, gpu: GPUTarget) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What the JIT makes of a launch: types of arguments, and what it assumes of them (divisible by 16, equal to 1)."""
    kernel: JITFunction = launch.kernel
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    bound, specialization, rest = bind(*launch.arguments, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return ASTSource(kernel, signature, constants, attributes), gpu, options


def _read(compiled: CompiledKernel, gpu: GPUTarget) -> _Reading:
    has_dot = "tt.dot" in compiled.asm["ttir"]
    if gpu.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", code)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
    else:
        code, usage = _disassemble(compiled.asm["cubin"])
        registers, stack = _number(r"\bREG:(\d+)", usage), _number(r"\bSTACK:(\d+)", usage)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))  # LOCAL of the usage stays 0 where registers spill
    found = _TENSOR_CORE[gpu.backend].findall(code)
    return _Reading(
        registers, stack, spills, compiled.metadata.shared, len(found), "+".join(sorted(set(found))), has_dot
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code and the usage of registers and memory, as NVIDIA's tool (it comes with Triton) prints them."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        code, usage = (
            subprocess.run([tool, option, str(file)], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return code, usage


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern!r}")
    return int(match[1])


def _fault(reading: _Reading, gpu: GPUTarget) -> str:
    """Why a kernel should not run, or nothing."""
    faults = []
    if reading.stack:
        faults.append(f"{reading.stack} bytes of stack")
    if reading.spills:
        faults.append(f"{reading.spills} spills")
    if reading.has_dot and not reading.tensor_core:
        faults.append("products without tensor cores")
    if reading.shared > SHARED_LIMIT[gpu.backend]:
        faults.append(f"{reading.shared} bytes of shared memory")
    return ", ".join(faults)
