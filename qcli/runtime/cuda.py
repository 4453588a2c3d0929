"""Launches the CUDA kernels of kernels/cuda/ on torch's tensors, context and streams."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

# As kernels/cuda/common.cuh knows them.
TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}

_PLAIN = {int, float, bool, bytes}  # all but tensors: quicker than isinstance
_CODES = {"p": "P", "i": "i", "q": "q", "f": "f"}


class Backend(Protocol):
    """What compiles and runs a kernel: PyCUDA, or in tests an emulator on the CPU."""

    def serves(self, device: torch.device) -> bool:
        """Whether kernels run on tensors of this device."""

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> object:
        """The kernel `entry` of kernels/cuda/SOURCE.cu, compiled with each "NAME=VALUE" of `constants` defined."""

    def launch(
        self, function: object, grid: tuple, block: tuple, shared: int, arguments: bytes, device: torch.device
    ) -> None:
        """Launches it on torch's current stream; `shared` are bytes of dynamic shared memory."""

    def multiprocessors(self, device: torch.device) -> int:
        """How many streaming multiprocessors the device has."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Its compute capability."""

    def shared_memory(self, device: torch.device) -> int:
        """Bytes of shared memory of a multiprocessor."""


_backend: Backend | None = None


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels run on x's device; else the reference serves."""
    return _backend is not None and _backend.serves(x.device)


@contextmanager
def using(backend: Backend | None) -> Iterator[None]:
    """Runs kernels on another backend for a while: for tests."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def multiprocessors(x: torch.Tensor) -> int:
    """Streaming multiprocessors of x's device."""
    return _backend.multiprocessors(x.device)


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Compute capability of x's device."""
    return _backend.capability(x.device)


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory of a multiprocessor of x's device."""
    return _backend.shared_memory(x.device)


def kernel(source: str, signature: str, entry: str | None = None) -> Callable[..., None]:
    """The kernel `entry` (by default of the file's name) of kernels/cuda/SOURCE.cu.

    Called as launch(constants, grid, threads, shared, *arguments): constants a tuple of "NAME=VALUE", grid one to three
    ints, threads of a block, bytes of dynamic shared memory. A letter of `signature` per argument: p a tensor or an address (0 for
    none), i int32, q int64, f float32, t bytes, a table passed by value whose elements have 4 bytes. The first argument
    is a tensor and says on which device.

    Tensors must be contiguous and of the sizes that the kernel states: nothing is checked from here on.
    """
    entry = entry or source
    layouts: dict[tuple[int, ...], struct.Struct] = {}
    functions: dict[tuple, object] = {}
    tables = [i for i, letter in enumerate(signature) if letter == "t"]

    def layout(arguments) -> struct.Struct:
        sizes = tuple(len(arguments[i]) for i in tables)
        if sizes not in layouts:
            lengths = iter(sizes)
            # A table begins at a multiple of its elements' 4 bytes, which struct knows only of numbers.
            codes = (f"0i{next(lengths)}s" if letter == "t" else _CODES[letter] for letter in signature)
            layouts[sizes] = struct.Struct("@" + "".join(codes))
        return layouts[sizes]

    def launch(constants: tuple[str, ...], grid: tuple[int, ...], threads: int, shared: int, *arguments) -> None:
        device, backend = arguments[0].device, _backend
        key = (backend, device, constants)
        function = functions.get(key)
        if function is None:
            function = functions[key] = backend.function(source, entry, constants, device)
        values = [value if type(value) in _PLAIN else value.data_ptr() for value in arguments]
        packed = layout(arguments).pack(*values)
        backend.launch(function, (*grid, 1, 1)[:3], (threads, 1, 1), shared, packed, device)

    return launch


_tables: dict[tuple[int, torch.device], torch.Tensor] = {}


def table(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A table of codebooks.py on the device, copied there once."""
    key = (id(values), device)
    if key not in _tables:
        _tables[key] = torch.from_numpy(values).to(device)
    return _tables[key]


def type_name(op: str, x: torch.Tensor, name: str = "x") -> str:
    """The C++ name of x's dtype. Raises TypeError."""
    if x.dtype not in TYPES:
        raise TypeError(f"{op}: {name} is {x.dtype}, expected float32, bfloat16 or float16")
    return TYPES[x.dtype]


def require(
    op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device
) -> torch.Tensor:
    """The tensor, contiguous and aligned to 16 bytes. Raises ValueError unless it lies on `device` with that dtype and so
    many elements: a kernel reads and writes where it is told to."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} lies on {tensor.device}, expected {device}")
    if tensor.dtype != dtype or tensor.numel() != numel:
        raise ValueError(f"{op}: {name} has {tensor.numel()} elements of {tensor.dtype}, expected {numel} of {dtype}")
    return aligned(tensor)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and beginning at a multiple of 16 bytes, as vector loads want it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
