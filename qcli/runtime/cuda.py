"""Launches the CUDA kernels of kernels/cuda/ through PyCUDA, on torch's tensors, context and streams.

torch works in the primary context of each GPU; PyCUDA takes the same one. PyCUDA notes contexts per thread, ends the process
where a thread ends with one noted, and makes streams only of its own. So the context is pushed around each call and popped
after it, in whichever thread, and torch finds the driver as it left it. Work goes to torch's current stream:

- its default stream, which PyCUDA calls None;
- one that PyCUDA made and torch adopted (`capture_stream`);
- any other by way of a stream of ours that waits for it, and that it waits for: both are orders to the GPU and part of a
  graph where one is captured. Each has one of its own, so that no capture meets work of another stream.

Nothing here is imported or touched before a tensor on a GPU asks.
"""

import atexit
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from qcli.errors import KernelError
from qcli.runtime import nvcc

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


class KernelsWarning(UserWarning):
    """A GPU is there and the CUDA kernels cannot serve it."""


class _Device:
    """One GPU: its primary context, our streams on it, or the problem with it."""

    def __init__(self):
        self.problem: KernelError | None = None
        self.index: int | None = None
        self.driver = self.context = None
        self.streams: dict[int, object] = {0: None}  # by handle, those that PyCUDA can launch on
        self.capture_streams: dict[int, torch.cuda.Stream] = {}  # by thread
        self.beside: dict[int, tuple[object, torch.cuda.Stream]] = {}  # by the handle of the foreign stream

    def open(self, index: int) -> None:
        """Raises KernelError where no kernel can run."""
        if torch.version.cuda is None:
            raise KernelError("this torch was built without CUDA", "install a CUDA build of torch: " + TORCH)
        self.driver, self.index = _import_driver(), index
        torch.cuda.init()
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST:
            raise KernelError(
                f"the GPU has compute capability {capability[0]}.{capability[1]}, expected {OLDEST[0]}.{OLDEST[1]} or later"
            )
        if nvcc.find() is None and not nvcc.complete(capability):
            nvcc.require()
        try:
            self.driver.init()
            self.context = self.driver.Device(index).retain_primary_context()
        except self.driver.Error as e:
            raise KernelError(f"the driver gives PyCUDA no context: {e}", DRIVER) from e
        self.load("probe", "probe", ())

    def close(self) -> None:
        """Gives the context back. PyCUDA releases a primary context rightly only where it is pushed, and clears up
        modules and streams without complaint only after that."""
        if self.context is not None:
            self.context.push()
            self.context.detach()
        self.problem = KernelError("the process is ending")

    def load(self, source: str, entry: str, constants: tuple[str, ...]) -> "_Function":
        """Raises KernelError."""
        image = nvcc.image(source, constants, torch.cuda.get_device_capability(self.index))
        self.context.push()
        try:
            return _Function(self, f"{source}.cu: {entry}", self.driver.module_from_buffer(image).get_function(entry))
        except self.driver.Error as e:
            raise KernelError(f"the driver refuses {source}.cu: {entry}: {e}", DRIVER) from e
        finally:
            self.context.pop()

    def stream(self) -> tuple[object, torch.cuda.Stream]:
        """A new stream, as PyCUDA and as torch know it. It does not wait for the default stream."""
        self.context.push()
        try:
            made = self.driver.Stream(1)
        finally:
            self.context.pop()
        return made, torch.cuda.get_stream_from_external(made.handle, self.index)


class _Function:
    """A loaded kernel. `name` is for messages, `room` the bytes of dynamic shared memory that it may have as of now."""

    def __init__(self, device: _Device, name: str, function):
        attribute = device.driver.function_attribute
        self.device, self.name, self.function, self.launch = device, name, function, function._launch_kernel
        self.room = function.get_attribute(attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES)

    def run(self, grid: tuple, block: tuple, arguments: bytes, shared: int, stream) -> None:
        device = self.device
        device.context.push()
        try:
            if shared > self.room:
                attribute = device.driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                self.function.set_attribute(attribute, shared)
                self.room = shared
            self.launch(grid, block, arguments, shared, stream)
        except device.driver.Error as e:
            raise KernelError(
                f"{self.name} failed on cuda:{device.index} with grid {grid}, block {block} and {shared} bytes of dynamic"
                f" shared memory: {e}",
                "If an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which.",
            ) from e
        finally:
            device.context.pop()


class PyCuda:
    """The backend on NVIDIA GPUs."""

    def __init__(self):
        self._devices: dict[torch.device, _Device] = {}
        self._lock = threading.RLock()
        self._told: set[str] = set()

    def serves(self, device: torch.device) -> bool:
        """Whether kernels run on that device. Where they cannot on a GPU, a KernelsWarning tells why, once."""
        if device.type != "cuda":
            return False
        return (self._devices.get(device) or self._open(device)).problem is None

    def problem(self, device: torch.device) -> KernelError | None:
        """Why kernels do not run on that GPU."""
        return (self._devices.get(device) or self._open(device)).problem

    def _open(self, device: torch.device) -> _Device:
        with self._lock:
            if device in self._devices:
                return self._devices[device]
            if not self._devices:
                atexit.register(self.close)
            opened = _Device()
            try:
                opened.open(device.index)
            except KernelError as e:
                opened.problem = e
                if str(e) not in self._told:  # several GPUs mostly share theirs
                    self._told.add(str(e))
                    text = f"CUDA kernels cannot run and plain torch serves, more slowly: {e}"
                    warnings.warn(f"{text}. {e.hint or ''}".rstrip(), KernelsWarning, stacklevel=2)
            self._devices[device] = opened
            return opened

    def close(self) -> None:
        """Gives every context back: PyCUDA must have done so before the interpreter ends."""
        for device in self._devices.values():
            device.close()

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> _Function:
        """As in Backend. Raises KernelError."""
        with self._lock:  # two threads would compile the same
            return self._devices[device].load(source, entry, constants)

    def launch(
        self, function: _Function, grid: tuple, block: tuple, shared: int, arguments: bytes, device: torch.device
    ) -> None:
        """As in Backend. Raises KernelError."""
        streams = function.device.streams
        handle = _current_stream(device.index)
        if handle in streams:
            function.run(grid, block, arguments, shared, streams[handle])
            return
        current = torch.cuda.current_stream(device)
        ours, adopted = self._beside(function.device, handle)
        adopted.wait_stream(current)
        function.run(grid, block, arguments, shared, ours)
        current.wait_stream(adopted)

    def _beside(self, device: _Device, handle: int) -> tuple[object, torch.cuda.Stream]:
        with self._lock:
            if handle not in device.beside:
                device.beside[handle] = device.stream()
            return device.beside[handle]

    def capture_stream(self, device: torch.device) -> torch.cuda.Stream:
        """A stream that kernels are launched on directly. Each thread has its own: during a capture another thread's
        work would become part of the graph."""
        with self._lock:
            opened, thread = self._devices[device], threading.get_ident()
            if thread not in opened.capture_streams:
                ours, adopted = opened.stream()
                opened.streams[ours.handle] = ours
                opened.capture_streams[thread] = adopted
            return opened.capture_streams[thread]

    def multiprocessors(self, device: torch.device) -> int:
        """As in Backend."""
        return torch.cuda.get_device_properties(device).multi_processor_count

    def capability(self, device: torch.device) -> tuple[int, int]:
        """As in Backend."""
        return torch.cuda.get_device_capability(device)


_backend: Backend | None = PyCuda()


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels run on x's device; else the reference serves."""
    return _backend is not None and _backend.serves(x.device)


@contextmanager
def using(backend: Backend | None) -> Iterator[None]:
    """Runs kernels on another backend for a while, or with None the reference: for tests and benchmarks."""
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
