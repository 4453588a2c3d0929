"""Calls the compiled CPU kernels through ctypes: which variant runs, and on how many threads.

The library holds every kernel once per instruction set ("variant"). By default the best variant that this CPU supports runs.
QCLI_CPU_ISA names another, or `reference` for the ops in plain torch. Those also run where the library was not built.
The threads are torch's: its OpenMP pool, and torch.get_num_threads() of them.
"""

import ctypes
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from qcli.errors import UsageError

LIBRARY = "libqcli_cpu.so"
OTHER = "QCLI_CPU_LIBRARY"
CHOICE = "QCLI_CPU_ISA"
REFERENCE = "reference"

# As in kernels/cpu/common.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_HUGE_FROM = 8 << 20  # bytes
_NUMBERS = {int, float, bool, type(None)}  # every argument type except tensors; a look-up is faster than isinstance
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_int64, "f": ctypes.c_float}


@cache
def path() -> Path | None:
    """The compiled library. None if the package was installed without a compiler. QCLI_CPU_LIBRARY names another library."""
    if os.environ.get(OTHER):
        return Path(os.environ[OTHER])
    from qcli import runtime

    # An editable install keeps compiled files outside the sources: this package then has two folders.
    places = [Path(__file__).parent / LIBRARY, *(Path(folder) / LIBRARY for folder in runtime.__path__)]
    return next((place for place in places if place.exists()), None)


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """(the library, None), or (None, why there is none)."""
    if path() is None:
        return None, "not built: there was no C++ compiler when qcli was installed"
    try:
        library = ctypes.CDLL(str(path()))
    except OSError as e:
        return None, f"cannot be loaded: {e}"
    try:
        library.qcli_variants.restype = ctypes.c_char_p
        library.qcli_prefer_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.qcli_prefer_huge_pages.restype = None
        library.qcli_use_openmp.argtypes = [ctypes.c_void_p]
        library.qcli_use_openmp(_torch_openmp())
    except AttributeError:
        return None, f"{path()} belongs to another version of qcli"
    return library, None


def library() -> ctypes.CDLL | None:
    """The loaded library; None if it cannot be used."""
    return _loaded()[0]


def problem() -> str | None:
    """Why the library cannot be used and the reference runs instead. None if it can be used."""
    return _loaded()[1]


def _torch_openmp() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch uses. None if there is no such name."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    for place in [*map(str, bundled), None]:  # None: the libraries that are loaded already
        try:
            return ctypes.cast(ctypes.CDLL(place).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def variants() -> list[str]:
    """The variants that this CPU supports, the best one last. Empty without the library."""
    return library().qcli_variants().decode().split() if library() else []


def _chosen() -> str | None:
    """The variant to use; None means the reference. Raises UsageError for an unknown name."""
    known = variants()
    wanted = os.environ.get(CHOICE)
    if not wanted:
        return known[-1] if known else None
    if wanted == REFERENCE:
        return None
    if wanted not in known:
        raise UsageError(
            f"the environment variable {CHOICE} is {wanted!r}" + (f"; the CPU kernels: {problem()}" if problem() else ""),
            f"This CPU supports {', '.join([*known, REFERENCE])}; unset it for the best of them.",
        )
    return wanted


_variant: str | None = _chosen()


def variant() -> str | None:
    """The variant in use. None means the reference."""
    return _variant


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Runs the kernels of another variant while this lasts; None means the reference. For tests and benchmarks."""
    global _variant
    before, _variant = _variant, name
    try:
        yield
    finally:
        _variant = before


def native_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions: a product in bfloat16 is then faster than one in float32."""
    return bool(library() and library().qcli_native_bfloat16())


def read_speed(tensors: Sequence[torch.Tensor], seconds: float = 0.1) -> float | None:
    """Bytes per second at which the threads read `tensors`, at best. None without the library, or without memory to read."""
    piece = 1 << 16  # as in kernels/cpu/cpu.cpp
    places = [start for x in tensors for start in range(x.data_ptr(), x.data_ptr() + x.nbytes - piece + 1, piece)]
    if library() is None or not places:
        return None
    read, best = library().qcli_read, 0.0
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_uint64
    starts = (ctypes.c_void_p * len(places))(*places)
    read(starts, len(places), torch.get_num_threads())  # what was mapped and never read comes from the disk
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        read(starts, len(places), torch.get_num_threads())
        best = max(best, piece * len(places) / (time.perf_counter() - started))
    return best


def last_level_cache() -> int:
    """Bytes of the largest cache; 8 MiB where the system does not report it."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if found:
            largest = max(largest, int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return largest or 8 << 20


def kernel(name: str, signature: str) -> Callable[..., None]:
    """The kernel `name` of the variant in use. `signature` has one letter per argument: p for a tensor, an address or None,
    i for int32, q for int64, f for float32. The number of threads is appended as the last argument.

    Tensors must be contiguous and have the sizes that the kernel states: they are not checked again.
    """
    argtypes = [_TYPES[letter] for letter in signature] + [ctypes.c_int]
    functions: dict[str | None, Callable] = {}

    def call(*arguments) -> None:
        function = functions.get(_variant)
        if function is None:
            function = functions[_variant] = getattr(library(), f"qcli_{name}_{_variant}")
            function.argtypes, function.restype = argtypes, None
        values = [value if type(value) in _NUMBERS else value.data_ptr() for value in arguments]
        function(*values, torch.get_num_threads())

    return call


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor that a kernel will fill. For a large tensor page faults cost more than the kernel, so it asks the system for
    huge pages."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _HUGE_FROM:
        library().qcli_prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


class Record:
    """A struct that a kernel reads, together with the tensors that it points to.

    `layout` has one letter per value, as in `kernel`. Values are aligned as in C.
    """

    def __init__(self, layout: str, *values: torch.Tensor | int | float | None):
        self._tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self.addresses = {tensor.data_ptr() for tensor in self._tensors}
        numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in values]
        self._bytes = ctypes.create_string_buffer(struct.pack(f"@{layout.replace('p', 'P')}", *numbers))
        self.address = ctypes.addressof(self._bytes)


def plain(x: torch.Tensor) -> bool:
    """Whether a kernel may be called directly, without the dispatch of its op, which costs as much as a small product. x must be a
    plain tensor on the CPU. Nothing may record or transform the call: no autograd, compiler, tracer, mode or profiler."""
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and _variant is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._autograd._profiler_enabled()
        and not x.is_neg()
    )


def address(table: np.ndarray) -> int:
    """The address of a table of codebooks.py, for a kernel. The table must live as long as the process."""
    return table.ctypes.data


def dtype_code(op: str, x: torch.Tensor, name: str = "x") -> int:
    """The number of x's dtype in the kernels. Raises TypeError."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {x.dtype}, expected float32, bfloat16 or float16")
    return DTYPES[x.dtype]


def require(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int, *, at_least: bool = False) -> torch.Tensor:
    """The tensor, contiguous. Raises ValueError unless it is on the CPU and has that dtype and `numel` elements: a kernel checks
    none of this itself."""
    if not tensor.is_cpu:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected cpu")
    if tensor.dtype != dtype or tensor.numel() < numel or (tensor.numel() != numel and not at_least):
        raise ValueError(f"{op}: {name} has {tensor.numel()} elements of {tensor.dtype}, expected {numel} of {dtype}")
    return tensor.contiguous()
