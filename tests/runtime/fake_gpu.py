"""A PyCUDA and the parts of torch.cuda that the launcher uses, without a GPU, as strict as the real ones.

`Gpu` keeps what both share: each thread's stack of contexts in the driver, the streams, what was launched. `pycuda()` is a
module like pycuda.driver, after its C++ sources: a stack of contexts per thread beside the driver's, which must be empty
where a thread ends; streams that only it makes and only it accepts; modules and streams that want a context pushed.
`torch_parts()` are the functions of torch. `driver_library()` compiles libcuda.c, for the real PyCUDA.
"""

import re
import subprocess
import threading
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch


class Stream:
    """What the driver knows of a stream. `graph` is the capture that it is part of, `unseen` whether that capture's first
    stream has yet to wait for it."""

    def __init__(self, handle: int, device: int):
        self.handle, self.device, self.graph, self.unseen = handle, device, None, False


class Gpu:
    """Two GPUs and what happened on them: `calls` of the driver, `launches`, and by graph the `captured` ones."""

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self.capability = capability
        self.calls, self.launches, self.captured = [], [], {}
        self.refuse: dict[str, str] = {}  # by function of the driver: the error it answers with
        self.streams: dict[int, Stream] = {}
        self._local, self.stacks = threading.local(), []

    def stack(self, name: str) -> list:
        """This thread's contexts: those of the "driver", or those that "pycuda" notes."""
        if not hasattr(self._local, name):
            setattr(self._local, name, [])
            self.stacks.append((name, getattr(self._local, name)))
        return getattr(self._local, name)

    def new_stream(self, device: int) -> int:
        """A stream of the driver; returns its handle."""
        handle = 0x1000 + 16 * len(self.streams)
        self.streams[handle] = Stream(handle, device)
        return handle

    def wait(self, waiting: int, other: int) -> None:
        """What is given to `waiting` from now on starts after what was given to `other`."""
        self.calls.append(("wait", waiting, other))
        if not (waiting and other):
            return
        waiting, other = self.streams[waiting], self.streams[other]
        if waiting.graph and not other.graph:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        if other.graph and not waiting.graph:
            waiting.graph = other.graph
        other.unseen = False

    def begin_capture(self, handle: int, graph: str) -> None:
        """What reaches this stream, or a stream that waits for it, becomes part of `graph`."""
        self.streams[handle].graph, self.captured[graph] = graph, []

    def end_capture(self, handle: int) -> None:
        """Raises RuntimeError where a stream of the capture was not waited for."""
        graph = self.streams[handle].graph
        for stream in self.streams.values():
            if stream.graph == graph:
                if stream.unseen and stream.handle != handle:
                    raise RuntimeError("capturing stream has unjoined work")
                stream.graph, stream.unseen = None, False

    def launch(self, name: str, device: int, grid, block, arguments: bytes, shared: int, handle: int) -> None:
        """Notes a launch, apart where it is captured."""
        stream = self.streams.get(handle)
        noted = SimpleNamespace(name=name, device=device, grid=grid, block=block, arguments=arguments, shared=shared, stream=handle)
        self.calls.append(("launch", name, handle))
        if stream and stream.graph:
            stream.unseen = True
            self.captured[stream.graph].append(noted)
        else:
            self.launches.append(noted)


def pycuda(gpu: Gpu) -> dict[str, ModuleType]:
    """The modules `pycuda` and `pycuda.driver`, for sys.modules."""
    package, driver = ModuleType("pycuda"), ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    class LogicError(Error):
        pass

    class LaunchError(Error):
        pass

    def ask(function: str, *values) -> None:
        gpu.calls.append((function, *values))
        if function in gpu.refuse:
            kind = LaunchError if "launch" in gpu.refuse[function] else LogicError
            raise kind(f"{function} failed: {gpu.refuse[function]}")

    def current(but=None):
        noted = gpu.stack("pycuda")
        while noted and (noted[-1] is but or not noted[-1].valid):
            noted.pop()
        return noted[-1] if noted else None

    class Context:
        def __init__(self, device: int):
            self.device, self.valid, self.thread = device, True, threading.get_ident()

        def push(self) -> None:
            if gpu.stack("pycuda"):
                gpu.stack("driver").pop()
            gpu.stack("driver").append(self.device)
            gpu.stack("pycuda").append(self)

        @staticmethod
        def pop() -> None:
            if not gpu.stack("pycuda"):
                raise LogicError("context::pop failed: invalid device context - cannot pop non-current context")
            gpu.stack("driver").pop()
            gpu.stack("pycuda").pop()
            if current():
                gpu.stack("driver").append(current().device)

        def detach(self) -> None:
            if not self.valid:
                raise LogicError("context::detach failed: invalid device context - cannot detach from invalid context")
            active = current() is self
            if active or self.thread == threading.get_ident():
                ask("cuDevicePrimaryCtxRelease", self.device)
            self.valid = False
            if active and current(self):
                gpu.stack("driver").append(current().device)

        get_current = staticmethod(current)

    class Device:
        def __init__(self, index: int):
            ask("cuDeviceGet", index)
            self.index = index

        def retain_primary_context(self) -> Context:
            ask("cuDevicePrimaryCtxRetain", self.index)
            return Context(self.index)

    def wants_context() -> Context:
        if current() is None:
            raise LogicError("explicit_context_dependent failed: invalid device context - no currently active context?")
        return current()

    class PyStream:
        def __init__(self, flags: int = 0):
            ask("cuStreamCreate", flags)
            self.handle = gpu.new_stream(wants_context().device)

    class Function:
        def __init__(self, name: str, device: int):
            self.name, self.device, self.room = name, device, 49152

        def get_attribute(self, attribute: str) -> int:
            assert attribute == driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
            return self.room

        def set_attribute(self, attribute: str, value: int) -> None:
            assert attribute == driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
            ask("cuFuncSetAttribute", self.name, value)
            if value > 232448:
                raise LogicError("cuFuncSetAttribute failed: invalid argument")
            self.room = value

        def _launch_kernel(self, grid, block, arguments, shared, stream) -> None:
            assert isinstance(grid, tuple) and isinstance(block, tuple) and len(grid) <= 3 and len(block) <= 3
            assert isinstance(shared, int) and shared >= 0 and memoryview(arguments).contiguous
            if stream is not None and type(stream) is not PyStream:
                raise TypeError("No registered converter was able to produce a C++ rvalue of type pycuda::stream")
            ask("cuLaunchKernel")
            handle = stream.handle if stream else 0
            if gpu.stack("driver")[-1:] != [self.device]:
                raise LogicError("cuLaunchKernel failed: invalid device context")
            if handle and gpu.streams[handle].device != self.device:
                raise LogicError("cuLaunchKernel failed: invalid resource handle")
            if shared > self.room or min(grid) < 1 or min(block) < 1 or block[0] > 1024:
                raise LogicError("cuLaunchKernel failed: invalid argument")
            gpu.launch(self.name, self.device, grid, block, bytes(arguments), shared, handle)

    class Module:
        def __init__(self, device: int):
            self.device = device

        def get_function(self, name: str) -> Function:
            ask("cuModuleGetFunction", name)
            return Function(name, self.device)

    def module_from_buffer(buffer) -> Module:
        assert memoryview(buffer).contiguous
        ask("cuModuleLoadDataEx", bytes(buffer))
        return Module(wants_context().device)

    driver.Error, driver.LogicError, driver.LaunchError = Error, LogicError, LaunchError
    driver.Context, driver.Device, driver.Stream = Context, Device, PyStream
    driver.module_from_buffer, driver.init = module_from_buffer, lambda flags=0: ask("cuInit", flags)
    driver.function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES="MAX_DYNAMIC_SHARED_SIZE_BYTES")
    package.driver = driver
    return {"pycuda": package, "pycuda.driver": driver}


class TorchStream:
    """A torch.cuda.Stream."""

    def __init__(self, gpu: Gpu, handle: int, device: int):
        self.gpu, self.cuda_stream, self.device = gpu, handle, torch.device("cuda", device)

    def wait_stream(self, other: "TorchStream") -> None:
        """As torch's."""
        self.gpu.wait(self.cuda_stream, other.cuda_stream)


class Current:
    """The current stream of each device, which a test sets."""

    def __init__(self):
        self.handles = {0: 0, 1: 0}


def torch_parts(gpu: Gpu, current: Current) -> list[tuple[object, str, object]]:
    """What to put into torch: (object, name, value)."""

    def index(device) -> int:
        return device if isinstance(device, int) else device.index

    def adopt(handle: int, device) -> TorchStream:
        gpu.streams.setdefault(handle, Stream(handle, index(device)))
        return TorchStream(gpu, handle, index(device))

    major, minor = gpu.capability
    properties = SimpleNamespace(
        name="Fake GPU", major=major, minor=minor, multi_processor_count=132, shared_memory_per_multiprocessor=233472
    )
    return [
        (torch.version, "cuda", "13.0"),
        (torch._C, "_cuda_getCurrentRawStream", lambda device: current.handles[device]),
        (torch.cuda, "init", lambda: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device: properties),
        (torch.cuda, "current_stream", lambda d: TorchStream(gpu, current.handles[index(d)], index(d))),
        (torch.cuda, "get_stream_from_external", adopt),
    ]


class Tensor:
    """What a kernel sees of a tensor on a GPU."""

    def __init__(self, device: int = 0, address: int = 0x7000):
        self.device, self._address = torch.device("cuda", device), address

    def data_ptr(self) -> int:
        """As torch's."""
        return self._address


def driver_library(folder: Path) -> Path:
    """Compiles a libcuda.so.1 with every function that the PyCUDA installed here wants to find in it; returns its path."""
    source = Path(__file__).with_name("libcuda.c").read_text()
    module = next(Path(find_spec("pycuda").origin).parent.glob("_driver*.so")).read_bytes()
    wanted = {name.decode() for name in re.findall(rb"(?<=\0)cu[A-Z]\w+(?=\0)", module)}
    missing = sorted(wanted - set(re.findall(r"^int (\w+)\(", source, re.MULTILINE)))
    source += "".join(f"int {name}(void) {{ return 801; }}\n" for name in missing)
    output = folder / "libcuda.so.1"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(output)]
    subprocess.run(command, input=source, text=True, check=True)
    return output
