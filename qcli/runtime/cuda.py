"""Launches the CUDA kernels of kernels/cuda/ through PyCUDA, on torch's tensors, context and streams.

torch works in the primary context of each GPU, and PyCUDA uses the same one. PyCUDA records contexts per thread. It ends the
process if a thread ends with a context recorded, and it launches only on its own streams. Each call therefore pushes the context
before it and pops it after it, in any thread, so torch finds the driver unchanged. Work is launched on torch's current stream:

- the default stream is None in PyCUDA;
- a stream that PyCUDA made and torch adopted (`capture_stream`) is used directly;
- for any other stream there is a stream of our own. It waits for that stream before the kernel, and that stream waits for it
  afterwards. Both waits are orders to the GPU, so a captured graph contains them. Each foreign stream has its own partner, so a
  capture contains no work of another stream.

PyCUDA is imported only when a tensor on a GPU needs it.
"""

import atexit
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from qcli.errors import KernelError, QcliWarning
from qcli.runtime import nvcc, problems
from qcli.runtime.arguments import TYPES, aligned, packer, require, table, type_name

__all__ = ["TYPES", "aligned", "require", "table", "type_name"]  # ops need these beside the functions below


class Backend(Protocol):
    """Compiles and runs kernels: PyCUDA, or in tests an emulator on the CPU."""

    def serves(self, device: torch.device) -> bool:
        """Whether kernels run on tensors of this device."""

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> object:
        """The kernel `entry` of kernels/cuda/SOURCE.cu, compiled with each "NAME=VALUE" of `constants` defined."""

    def launch(self, function: object, grid: tuple, block: tuple, shared: int, arguments: bytes, device: torch.device) -> None:
        """Launches the kernel on torch's current stream. `shared` is the dynamic shared memory in bytes."""

    def multiprocessors(self, device: torch.device) -> int:
        """How many streaming multiprocessors the device has."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """The device's compute capability."""

    def shared_memory(self, device: torch.device) -> int:
        """Shared memory of one multiprocessor, in bytes."""


class _Device:
    """One GPU: torch's context on it and our streams, or the problem that keeps kernels from running on it."""

    def __init__(self):
        self.problem: KernelError | None = None
        self.context = None  # PyCUDA's object
        self.busy = threading.Lock()  # held while a thread has the context pushed
        self.streams: dict[int, object] = {0: None}  # handle -> stream on which PyCUDA can launch
        self.capture_streams: dict[int, torch.cuda.Stream] = {}  # by thread
        self.beside: dict[int, tuple[object, torch.cuda.Stream]] = {}  # handle of a foreign stream -> its partner

    def open(self, index: int) -> None:
        """Raises KernelError if no kernel can run."""
        if torch.version.cuda is None:
            raise KernelError("this torch was built without CUDA", problems.TORCH)
        self.driver, self.index = _import_driver(), index
        quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self.current = quick or (lambda index: torch.cuda.current_stream(index).cuda_stream)
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(index)
        self.multiprocessors = properties.multi_processor_count
        self.capability = properties.major, properties.minor
        self.shared_memory = properties.shared_memory_per_multiprocessor
        if self.capability < nvcc.OLDEST:
            found, oldest = (".".join(map(str, capability)) for capability in (self.capability, nvcc.OLDEST))
            raise KernelError(f"{properties.name} has compute capability {found}, the kernels need {oldest} or later")
        if nvcc.find() is None and not nvcc.complete(self.capability):
            nvcc.require()
        try:
            self.driver.init()
            self.context = self.driver.Device(index).retain_primary_context()
        except self.driver.Error as e:
            raise KernelError(f"PyCUDA gets no context of the driver: {e}", problems.DRIVER) from e
        self.load("probe", "probe", ())

    def close(self) -> None:
        """Releases the context. PyCUDA releases a primary context in any thread that has pushed it, and accepts that modules and
        streams still exist."""
        with self.busy:  # a daemon thread must not have it pushed when the interpreter ends
            self.problem = KernelError("the process is ending")
            context, self.context = self.context, None
        if context is not None:
            with suppress(self.driver.Error):  # the GPU may have failed already
                context.push()
                context.detach()

    @contextmanager
    def _entered(self, task: str) -> Iterator[None]:
        with self.busy:
            if self.context is None:
                raise self.problem
            self.context.push()
            try:
                yield
            except self.driver.Error as e:
                raise KernelError(f"the driver of cuda:{self.index} cannot {task}: {e}", problems.DRIVER) from e
            finally:
                self.context.pop()

    def load(self, source: str, entry: str, constants: tuple[str, ...]) -> "_Function":
        """Raises KernelError."""
        image = nvcc.image(source, constants, self.capability)
        with self._entered(f"load {entry} of {source}.cu"):
            return _Function(self, entry, self.driver.module_from_buffer(image).get_function(entry))

    def stream(self) -> tuple[object, torch.cuda.Stream]:
        """A new stream, as PyCUDA's object and as torch's. It does not wait for the default stream."""
        with self._entered("make a stream"):
            made = self.driver.Stream(1)
        return made, torch.cuda.get_stream_from_external(made.handle, self.index)


class _Function:
    """A loaded kernel. `room` is its current limit of dynamic shared memory, in bytes."""

    def __init__(self, device: _Device, entry: str, function):
        self.device, self.entry, self.function, self.launch = device, entry, function, function._launch_kernel
        self.limit = device.driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.room = function.get_attribute(self.limit)

    def run(self, grid: tuple, block: tuple, arguments: bytes, shared: int, stream) -> None:
        device = self.device
        with device.busy:
            context = device.context
            if context is None:
                raise device.problem
            context.push()
            try:
                if shared > self.room:
                    self.function.set_attribute(self.limit, shared)
                    self.room = shared
                self.launch(grid, block, arguments, shared, stream)
            except device.driver.Error as e:
                sizes = f"grid {grid}, block {block}, {shared} bytes of dynamic shared memory"
                raise KernelError(f"{self.entry} on cuda:{device.index} ({sizes}): {e}", problems.LAUNCH) from e
            finally:
                context.pop()


def _import_driver():
    """pycuda.driver. Raises KernelError that says what is wrong with PyCUDA."""
    try:
        import pycuda.driver as driver
    except Exception as e:  # a module compiled for another numpy raises more than ImportError
        raise problems.import_error(e) from e
    return driver


class PyCuda:
    """The backend on NVIDIA GPUs."""

    def __init__(self):
        self._devices: dict[torch.device, _Device] = {}
        self._lock = threading.RLock()

    def serves(self, device: torch.device) -> bool:
        """As in Backend. Warns once about a GPU on which kernels cannot run."""
        return device.type == "cuda" and self.problem(device) is None

    def problem(self, device: torch.device) -> KernelError | None:
        """Why kernels do not run on that GPU; None if they do."""
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
            self._devices[device] = opened
            if e := opened.problem:
                text = f"no CUDA kernels, plain torch runs in their place, more slowly: {e.message}"
                warnings.warn(f"{text}; {e.hint}" if e.hint else text, QcliWarning, stacklevel=3)
            return opened

    def close(self) -> None:
        """Releases every context. PyCUDA needs this before the interpreter ends."""
        for device in self._devices.values():
            device.close()

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> _Function:
        """As in Backend. Raises KernelError."""
        with self._lock:  # otherwise two threads could compile the same kernel
            return self._devices[device].load(source, entry, constants)

    def launch(self, function: _Function, grid: tuple, block: tuple, shared: int, arguments: bytes, device: torch.device) -> None:
        """As in Backend. Raises KernelError."""
        handle, streams = function.device.current(device.index), function.device.streams
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
        """As the module's function of that name. Raises KernelError."""
        with self._lock:
            opened, thread = self._devices.get(device) or self._open(device), threading.get_ident()
            if opened.problem:
                raise opened.problem
            if thread not in opened.capture_streams:
                ours, opened.capture_streams[thread] = opened.stream()
                opened.streams[ours.handle] = ours
            return opened.capture_streams[thread]

    def multiprocessors(self, device: torch.device) -> int:
        """As in Backend."""
        return self._devices[device].multiprocessors

    def capability(self, device: torch.device) -> tuple[int, int]:
        """As in Backend."""
        return self._devices[device].capability

    def shared_memory(self, device: torch.device) -> int:
        """As in Backend."""
        return self._devices[device].shared_memory


_backend: Backend | None = PyCuda()


def serves(x: torch.Tensor) -> bool:
    """Whether the kernels run on x's device. Otherwise the reference runs."""
    return _backend is not None and _backend.serves(x.device)


@contextmanager
def using(backend: Backend | None) -> Iterator[None]:
    """Runs kernels on another backend while this lasts; None means the reference. For tests and benchmarks."""
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
    """Shared memory of one multiprocessor of x's device, in bytes."""
    return _backend.shared_memory(x.device)


def problem(device: torch.device) -> KernelError | None:
    """Why the reference runs on a GPU; None if the kernels run."""
    return _backend.problem(device)


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for capturing a CUDA graph of kernels: torch.cuda.graph(graph, stream=...). Kernels are launched on it directly.
    Each thread has its own stream: on a shared one, the work of another thread would become part of the graph.

    Run every kernel once before the capture: a kernel cannot be loaded during it. Raises KernelError if no kernel can run.
    """
    return _backend.capture_stream(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


def kernel(source: str, signature: str, entry: str | None = None) -> Callable[..., None]:
    """The kernel `entry` (by default: the name of the file) of kernels/cuda/SOURCE.cu.

    It is called as launch(constants, grid, threads, shared, *arguments): `constants` is a tuple of "NAME=VALUE", `grid` has one to
    three ints, `threads` is the size of a block, `shared` the dynamic shared memory in bytes. `signature` has one letter per
    argument: p for a tensor or an address (0 for none), i for int32, q for int64, f for float32, t for bytes, which are a table
    of 4-byte elements passed by value. The first argument is a tensor; its device is the device of the launch.

    Tensors must be contiguous and have the sizes that the kernel states: they are not checked again.
    """
    entry, pack, ones = entry or source, packer(signature), (1, 1)
    functions: dict[tuple, object] = {}

    def launch(constants: tuple[str, ...], grid: tuple[int, ...], threads: int, shared: int, *arguments) -> None:
        device, backend = arguments[0].device, _backend
        key = backend, device, constants
        function = functions.get(key)
        if function is None:
            function = functions[key] = backend.function(source, entry, constants, device)
        backend.launch(function, (grid + ones)[:3], (threads, 1, 1), shared, pack(arguments), device)

    return launch
