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
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from qcli.errors import KernelError, QcliWarning
from qcli.runtime import nvcc, problems
from qcli.runtime.arguments import TYPES, aligned, packer, require, table, type_name

__all__ = ["TYPES", "aligned", "require", "table", "type_name"]  # what ops need beside the functions below


class Backend(Protocol):
    """What compiles and runs a kernel: PyCUDA, or in tests an emulator on the CPU."""

    def serves(self, device: torch.device) -> bool:
        """Whether kernels run on tensors of this device."""

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> object:
        """The kernel `entry` of kernels/cuda/SOURCE.cu, compiled with each "NAME=VALUE" of `constants` defined."""

    def launch(self, function: object, grid: tuple, block: tuple, shared: int, arguments: bytes, device: torch.device) -> None:
        """Launches it on torch's current stream; `shared` are bytes of dynamic shared memory."""

    def multiprocessors(self, device: torch.device) -> int:
        """How many streaming multiprocessors the device has."""

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Its compute capability."""

    def shared_memory(self, device: torch.device) -> int:
        """Bytes of shared memory of a multiprocessor."""


class _Device:
    """One GPU: torch's context on it, our streams, or the problem with it."""

    def __init__(self):
        self.problem: KernelError | None = None
        self.context = None  # as PyCUDA has it
        self.busy = threading.Lock()  # held while a thread has the context pushed
        self.streams: dict[int, object] = {0: None}  # by handle, those that PyCUDA can launch on
        self.capture_streams: dict[int, torch.cuda.Stream] = {}  # by thread
        self.beside: dict[int, tuple[object, torch.cuda.Stream]] = {}  # by the handle of the foreign stream

    def open(self, index: int) -> None:
        """Raises KernelError where no kernel can run."""
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
        """Gives the context back. PyCUDA releases a primary context where it is pushed, whatever the thread, and does not
        complain of modules and streams that live on."""
        with self.busy:  # a daemon thread that ends with the interpreter must not have it pushed
            self.problem = KernelError("the process is ending")
            context, self.context = self.context, None
        if context is not None:
            with suppress(self.driver.Error):  # the GPU may have failed before
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
        """A new stream as PyCUDA and as torch know it, which does not wait for the default stream."""
        with self._entered("make a stream"):
            made = self.driver.Stream(1)
        return made, torch.cuda.get_stream_from_external(made.handle, self.index)


class _Function:
    """A loaded kernel. `room` is how many bytes of dynamic shared memory it may have as of now."""

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
    """pycuda.driver. Raises KernelError with what is wrong with PyCUDA."""
    try:
        import pycuda.driver as driver
    except Exception as e:  # a module compiled for another numpy raises more than ImportError
        raise problems.of_import(e) from e
    return driver


class PyCuda:
    """The backend on NVIDIA GPUs."""

    def __init__(self):
        self._devices: dict[torch.device, _Device] = {}
        self._lock = threading.RLock()

    def serves(self, device: torch.device) -> bool:
        """As in Backend. A GPU that kernels cannot run on is told of in a warning, once."""
        return device.type == "cuda" and self.problem(device) is None

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
            self._devices[device] = opened
            if e := opened.problem:
                text = f"no CUDA kernels, plain torch serves in their place, more slowly: {e.message}"
                warnings.warn(f"{text}; {e.hint}" if e.hint else text, QcliWarning, stacklevel=3)
            return opened

    def close(self) -> None:
        """Gives every context back, which PyCUDA wants done before the interpreter ends."""
        for device in self._devices.values():
            device.close()

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> _Function:
        """As in Backend. Raises KernelError."""
        with self._lock:  # two threads would compile the same
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
        """As the function of that name. Raises KernelError."""
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


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory of a multiprocessor of x's device."""
    return _backend.shared_memory(x.device)


def problem(device: torch.device) -> KernelError | None:
    """Why the reference serves a GPU, None where the kernels do."""
    return _backend.problem(device)


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to capture a CUDA graph of kernels on, with torch.cuda.graph(graph, stream=...): they are launched on it
    directly. Each thread has its own, for during a capture another thread's work would become part of the graph.

    Run every kernel once before the capture: loading one is not allowed in it. Raises KernelError where none can run.
    """
    return _backend.capture_stream(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()))


def kernel(source: str, signature: str, entry: str | None = None) -> Callable[..., None]:
    """The kernel `entry` (by default of the file's name) of kernels/cuda/SOURCE.cu.

    Called as launch(constants, grid, threads, shared, *arguments): constants a tuple of "NAME=VALUE", grid one to three
    ints, threads of a block, bytes of dynamic shared memory. A letter of `signature` per argument: p a tensor or an address (0 for
    none), i int32, q int64, f float32, t bytes, a table passed by value whose elements have 4 bytes. The first argument
    is a tensor and says on which device.

    Tensors must be contiguous and of the sizes that the kernel states: nothing is checked from here on.
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
