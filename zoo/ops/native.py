"""The C++ kernels: built on first use, kept in a cache, called with plain pointers.

Each op's `native.cpp` includes `native.h`, headers beside it where it is long, and exports C functions, one for each
precision (`name_f32`, `name_f64`). It is compiled without PyTorch's headers, which takes seconds, for the CPU at hand,
and kept under the cache folder (`XDG_CACHE_HOME` or `~/.cache`, in `sequence-zoo/native`) by sources, flags, compiler
and CPU. It is linked without OpenMP's library: its symbols are then PyTorch's own, and both share one pool of threads.
As for any C++ build, `CXX` in the environment names another compiler and `CXXFLAGS` adds flags.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",  # but infinities and NaN keep their meaning
    "-ffp-contract=fast",
]

_HERE = Path(__file__).parent
_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.complex64: "c32", torch.complex128: "c64"}


@functools.cache
def obstacle(op: str) -> str | None:
    """Why the C++ kernels of an op cannot run on this machine, or None; the first call builds them."""
    try:
        _library(op)
    # RuntimeError: a user without a home; ValueError: CXX or CXXFLAGS with an open quotation
    except (OSError, subprocess.SubprocessError, RuntimeError, ValueError) as error:
        reason = _reason(error)
        _warn_once(reason)
        return reason
    return None


def call(op: str, function: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call `<function>_<precision>` of an op's library.

    Args:
        op: name of the op.
        function: name of the C function without its precision.
        dtype: the precision.
        arguments: contiguous tensors on the CPU, of `dtype`, its real part's dtype, or bool, passed as pointers (None:
            a null pointer); integers, passed as int64; floats as double. The number of threads is added behind them.

    Raises:
        ValueError: on a tensor that C++ would misread.
        MemoryError: if the kernel found no memory.
    """
    kernel, real = _function(op, function, dtype), dtype.to_real()
    values = []
    for index, x in enumerate(arguments):
        if isinstance(x, Tensor):
            if not (x.is_cpu and x.is_contiguous() and (x.dtype is dtype or x.dtype in (real, torch.bool))):
                raise ValueError(
                    f"{op}: argument {index} of {function} is {x.dtype} with strides {x.stride()} on {x.device}; "
                    f"wanted contiguous {dtype} on the CPU"
                )
            x = x.data_ptr()
        values.append(x)
    if kernel.argtypes is None:  # integers are as wide as pointers
        kernel.argtypes = [ctypes.c_double if isinstance(x, float) else ctypes.c_void_p for x in (*values, 1)]
    if kernel(*values, torch.get_num_threads()) != 0:
        raise MemoryError(f"{op}: no memory for the C++ kernel")


@functools.cache
def _function(op: str, function: str, dtype: torch.dtype) -> Callable[..., int]:
    if dtype not in _SUFFIX:
        raise ValueError(f"{op}: no C++ kernel for {dtype}")
    return getattr(_library(op), f"{function}_{_SUFFIX[dtype]}")


@functools.cache
def _library(op: str) -> ctypes.CDLL:
    compiler = _compiler()
    source = _HERE / op / "native.cpp"
    path = _cache_folder() / f"{op}-{_key(source, compiler)}.so"
    if not _is_whole(path):
        _build(compiler, source, path)
    return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was built: to load one that was cut short kills the process."""
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and digest.read_text() == _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compiler() -> list[str]:
    """The compiler, and the arguments that `CXX` has behind it."""
    commands = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["clang++"]]
    for command in commands:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise FileNotFoundError(f"no C++ compiler ({', '.join(command[0] for command in commands)})")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(root).expanduser() / "sequence-zoo" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(source: Path, compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    sources = [source, _HERE / "native.h", *sorted(source.parent.glob("*.h"))]
    parts = [*(path.read_text() for path in sources), *compiler[1:], *_flags(), version, _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _cpu() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    return f"{platform.machine()} {platform.processor()}"


def _build(compiler: list[str], source: Path, path: Path) -> None:
    """Compile and link beside `path`, then move into place, so that processes which build at once do not clash."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}-") as folder:
        compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        for command in (
            [*compiler, *_flags(), "-I", str(_HERE), "-c", str(source), "-o", str(compiled)],
            [*compiler, *_flags()[len(FLAGS) :], "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        digest = Path(folder, "kernel.sha256")
        digest.write_text(_digest(linked))
        linked.replace(path)
        digest.replace(path.with_suffix(".sha256"))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        lines = lines or [f"exit status {error.returncode}"]
        return f"the C++ compiler failed: {lines[0]}"
    return f"the C++ kernels cannot be built: {error}"


_has_warned = False


def _warn_once(reason: str) -> None:
    """One warning a process, whichever op finds out first; `kernel_report` has the reason for each."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(f"zoo: {reason}; PyTorch forms run instead ('chunked')", RuntimeWarning, stacklevel=2)
