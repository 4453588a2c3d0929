import os
import struct
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

from qcli.errors import KernelError, NotCompiledError, QcliWarning
from qcli.ops._library import _on_cuda
from qcli.runtime import arguments, cuda, nvcc
from tests.conftest import ROOT
from tests.runtime import fake_gpu
from tests.runtime.fake_gpu import Gpu, Tensor

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def install(monkeypatch):
    """Puts a fake GPU under torch and PyCUDA, and a new backend on it. Afterwards no thread may have a context left."""
    gpus = []

    def install(gpu: Gpu):
        gpus.append(gpu)
        current = fake_gpu.Current()
        for where, name, value in fake_gpu.torch_parts(gpu, current):
            monkeypatch.setattr(where, name, value, raising=False)
        for name, module in fake_gpu.pycuda(gpu).items():
            monkeypatch.setitem(sys.modules, name, module)
        at_exit = []
        monkeypatch.setattr(cuda.atexit, "register", at_exit.append)
        monkeypatch.setattr(nvcc, "find", lambda: "/usr/bin/nvcc")
        monkeypatch.setattr(nvcc, "image", lambda source, constants, capability: source.encode())
        backend = cuda.PyCuda()
        monkeypatch.setattr(cuda, "_backend", backend)
        return SimpleNamespace(gpu=gpu, current=current, backend=backend, at_exit=at_exit)

    yield install
    assert all(not stack for gpu in gpus for name, stack in gpu.stacks if name == "pycuda")


@pytest.fixture
def there(install):
    """The usual machine, with both GPUs in use."""
    there = install(Gpu())
    assert cuda.serves(Tensor(0)) and cuda.serves(Tensor(1))
    return there


some = cuda.kernel("some", "pi")


def run(*values, shared: int = 0, grid=(3,)) -> None:
    """Launches a kernel of a tensor and a number."""
    some(("DTYPE=float",), grid, 128, shared, *values)


def test_nothing_is_touched_before_a_tensor_on_a_gpu_asks(install, monkeypatch):
    there = install(Gpu())
    monkeypatch.setitem(sys.modules, "pycuda", None)  # an import would fail
    assert not cuda.serves(torch.ones(1)) and there.gpu.calls == [] and there.at_exit == []
    code = "import sys, qcli.ops.quantize_4bit; print('pycuda' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_primary_context_is_retained_once_and_the_probe_runs_through(there):
    assert cuda.serves(Tensor(0)) and cuda.problem(FIRST) is None
    assert [call for call in there.gpu.calls if call[0] == "cuDevicePrimaryCtxRetain"] == [
        ("cuDevicePrimaryCtxRetain", 0),
        ("cuDevicePrimaryCtxRetain", 1),
    ]
    assert ("cuModuleLoadDataEx", b"probe") in there.gpu.calls and there.gpu.launches == []
    assert (cuda.multiprocessors(Tensor(1)), cuda.capability(Tensor(1))) == (132, (9, 0))
    assert cuda.shared_memory(Tensor(1)) == 233472


def test_a_launch(there):
    run(Tensor(0, address=0xABC), 7)
    run(Tensor(1), 8, grid=(4, 5))
    first, second = there.gpu.launches
    assert (first.name, first.device, first.grid, first.block, first.shared, first.stream) == (
        "some",
        0,
        (3, 1, 1),
        (128, 1, 1),
        0,
        0,
    )
    assert first.arguments == struct.pack("@Pi", 0xABC, 7)
    assert (second.device, second.grid) == (1, (4, 5, 1))


def test_a_kernel_is_loaded_once_per_device_and_constants(there, monkeypatch):
    asked = []
    monkeypatch.setattr(nvcc, "image", lambda *what: asked.append(what) or b"image")
    kernel = cuda.kernel("file", "p", entry="inside")
    for device, constants in ((0, ("A=1",)), (0, ("A=1",)), (1, ("A=1",)), (0, ("A=2",))):
        kernel(constants, (1,), 32, 0, Tensor(device))
    assert asked == [("file", ("A=1",), (9, 0))] * 2 + [("file", ("A=2",), (9, 0))]
    assert [launch.name for launch in there.gpu.launches] == ["inside"] * 4


def test_arguments_lie_at_multiples_of_their_sizes():
    pack = arguments.packer("ipqfti")
    table = struct.pack("<3f", 1, 2, 3)
    packed = pack([1, Tensor(address=2), 3, 4.0, table, 5])
    assert packed == struct.pack("<i4xqqf12si", 1, 2, 3, 4.0, table, 5)
    assert pack([1, 0, 3, 4.0, table[:4], 5]) == struct.pack("<i4xqqf4si", 1, 0, 3, 4.0, table[:4], 5)
    assert arguments.packer("pp")([Tensor(address=16), 0]) == struct.pack("<qq", 16, 0)


def test_large_shared_memory_is_asked_for_once_per_size(there):
    for size in (49152, 49153, 100_000, 60_000, 100_000):
        run(Tensor(), 1, shared=size)
    widened = [call[2] for call in there.gpu.calls if call[0] == "cuFuncSetAttribute"]
    assert widened == [49153, 100_000] and [launch.shared for launch in there.gpu.launches][-1] == 100_000


def test_the_capture_stream_is_launched_on_directly(there):
    stream = cuda.capture_stream(FIRST)
    assert cuda.capture_stream(FIRST) is stream and cuda.capture_stream(torch.device("cuda")) is stream
    assert ("cuStreamCreate", 1) in there.gpu.calls  # one that does not wait for the default stream
    there.current.handles[0] = stream.cuda_stream
    there.gpu.begin_capture(stream.cuda_stream, "graph")
    run(Tensor(), 1)
    there.gpu.end_capture(stream.cuda_stream)
    assert [launch.stream for launch in there.gpu.captured["graph"]] == [stream.cuda_stream]
    assert not any(call[0] == "wait" for call in there.gpu.calls)


def test_a_foreign_stream_is_waited_for_and_waits(there):
    foreign = there.gpu.new_stream(0)
    there.current.handles[0] = foreign
    run(Tensor(), 1)
    run(Tensor(), 2)
    ours = there.gpu.launches[0].stream
    assert ours not in (0, foreign) and there.gpu.launches[1].stream == ours
    steps = [call for call in there.gpu.calls if call[0] in ("wait", "launch")]
    assert steps == [("wait", ours, foreign), ("launch", "some", ours), ("wait", foreign, ours)] * 2


def test_a_capture_on_a_foreign_stream_has_its_own_work_and_no_other(there):
    capturing, eager = there.gpu.new_stream(0), there.gpu.new_stream(0)
    there.gpu.begin_capture(capturing, "graph")
    for handle in (capturing, eager, capturing):
        there.current.handles[0] = handle
        run(Tensor(), handle)
    there.gpu.end_capture(capturing)
    assert len(there.gpu.captured["graph"]) == 2 and len(there.gpu.launches) == 1
    there.current.handles[0] = capturing
    run(Tensor(), 1)
    assert len(there.gpu.launches) == 2  # after the capture its helper runs eagerly again


def test_every_device_has_its_own_streams(there):
    streams = cuda.capture_stream(FIRST), cuda.capture_stream(SECOND)
    for device, stream in enumerate(streams):
        there.current.handles[device] = stream.cuda_stream
        run(Tensor(device), 1)
    assert [(launch.device, launch.stream) for launch in there.gpu.launches] == [
        (0, streams[0].cuda_stream),
        (1, streams[1].cuda_stream),
    ]


def test_torchs_context_is_left_as_it_was(there):
    driver = there.gpu.stack("driver")
    driver[:] = [1]  # torch has made the second device current
    run(Tensor(0), 1)
    cuda.capture_stream(FIRST)
    assert driver == [1]
    assert there.gpu.launches[0].device == 0


def in_threads(count: int, work) -> list:
    """What `work` gives in each of so many threads at once; raises what one of them raised."""
    results, start = [None] * count, threading.Barrier(count)

    def body(i: int) -> None:
        start.wait()
        try:
            results[i] = work(i)
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_threads_that_torch_never_touched(there, monkeypatch):
    compiling = threading.Lock()

    def image(*what) -> bytes:
        assert compiling.acquire(blocking=False), "two threads compile at once"
        time.sleep(0.001)
        compiling.release()
        return b"image"

    monkeypatch.setattr(nvcc, "image", image)
    kernel = cuda.kernel("shared", "pi")

    def work(i: int):
        for _ in range(50):
            kernel((), (1,), 32, 0, Tensor(i % 2), i)
        return cuda.capture_stream(FIRST).cuda_stream

    streams = in_threads(6, work)
    assert len(set(streams)) == 6 and len(there.gpu.launches) == 300
    assert all(launch.device == struct.unpack("@Pi", launch.arguments)[1] % 2 for launch in there.gpu.launches)
    # The fixture looks at the stacks of all of these threads.


def test_a_device_is_opened_once_by_many_threads(install):
    there = install(Gpu())
    assert in_threads(6, lambda i: cuda.serves(Tensor(0))) == [True] * 6
    assert sum(call[0] == "cuDevicePrimaryCtxRetain" for call in there.gpu.calls) == 1


def test_a_failed_launch_is_a_sentence(there):
    there.gpu.refuse["cuLaunchKernel"] = "unspecified launch failure"
    with pytest.raises(KernelError) as e:
        run(Tensor(1), 1, shared=64)
    assert e.value.message == (
        "some on cuda:1 (grid (3, 1, 1), block (128, 1, 1), 64 bytes of dynamic shared memory): "
        "cuLaunchKernel failed: unspecified launch failure"
    )
    assert "CUDA_LAUNCH_BLOCKING" in e.value.hint


def test_more_shared_memory_than_the_gpu_has(there):
    with pytest.raises(KernelError, match="300000 bytes of dynamic shared memory.*cuFuncSetAttribute failed"):
        run(Tensor(), 1, shared=300_000)
    run(Tensor(), 1, shared=100)
    assert len(there.gpu.launches) == 1


def test_a_kernel_that_does_not_load(there):
    there.gpu.refuse["cuModuleGetFunction"] = "named symbol not found"
    with pytest.raises(KernelError, match="cuda:0 cannot load other of other.cu: .*named symbol not found"):
        cuda.kernel("other", "p")((), (1,), 32, 0, Tensor())


def test_at_exit_every_context_is_given_back_and_the_reference_serves(there):
    assert there.at_exit == [there.backend.close]
    run(Tensor(0), 1)
    there.backend.close()
    released = [call for call in there.gpu.calls if call[0] == "cuDevicePrimaryCtxRelease"]
    assert [call[1] for call in released] == [0, 1]
    assert not cuda.serves(Tensor(0)) and cuda.problem(FIRST).message == "the process is ending"
    with pytest.raises(KernelError, match="the process is ending"):
        run(Tensor(0), 1)
    there.backend.close()  # a second time does nothing


def test_at_exit_in_another_thread_and_after_a_failure(there):
    there.gpu.refuse["cuDevicePrimaryCtxRelease"] = "unspecified launch failure"
    in_threads(1, lambda i: there.backend.close())
    assert not cuda.serves(Tensor(0))
    for name, stack in there.gpu.stacks:  # what a refused release leaves is not what the fixture is about
        if name == "pycuda":
            stack.clear()


def test_using_another_backend_for_a_while(there):
    with cuda.using(None):
        assert not cuda.serves(Tensor(0))
    assert cuda.serves(Tensor(0))


def refused(what: str) -> Gpu:
    gpu = Gpu()
    gpu.refuse[what] = "initialization error"
    return gpu


@pytest.mark.parametrize(
    "gpu, found, hint",
    [
        (refused("cuInit"), "gets no context of the driver: cuInit failed", "driver"),
        (refused("cuDevicePrimaryCtxRetain"), "gets no context of the driver: cuDevicePrimaryCtxRetain", "driver"),
        (refused("cuModuleLoadDataEx"), "cannot load probe of probe.cu: cuModuleLoadDataEx failed", "driver"),
        (Gpu(capability=(7, 0)), "Fake GPU has compute capability 7.0, the kernels need 7.5", None),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_of_once_and_the_reference_serves(gpu, found, hint, install):
    install(gpu)
    with pytest.warns(QcliWarning) as told:
        assert not cuda.serves(Tensor(0)) and not cuda.serves(Tensor(0))
    assert len(told) == 1 and found in str(told[0].message) and "plain torch runs" in str(told[0].message)
    assert found in cuda.problem(FIRST).message and (hint is None or hint in cuda.problem(FIRST).hint)
    with pytest.raises(KernelError, match=found.split(":")[0]):
        cuda.capture_stream(FIRST)


def test_without_nvcc(install, monkeypatch):
    install(Gpu())
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(nvcc, "complete", lambda capability: False)
    with pytest.warns(QcliWarning, match="there is no nvcc to compile them.*put the folder of its nvcc on PATH"):
        assert not cuda.serves(Tensor(0))
    monkeypatch.setattr(nvcc, "complete", lambda capability: True)
    monkeypatch.setattr(cuda, "_backend", cuda.PyCuda())
    assert cuda.serves(Tensor(0))


def test_the_reference_serves_for_a_form_that_did_not_come_compiled(there, monkeypatch):
    run = _on_cuda(lambda x: some((), (1,), 32, 0, x, 1) or "kernel", lambda x: "reference")
    assert run(Tensor(0)) == "kernel" and run(torch.ones(1)) == "reference"

    def lacking(*what):
        raise NotCompiledError("no nvcc", "install it")

    monkeypatch.setattr(nvcc, "image", lacking)
    another = cuda.kernel("another", "p")
    with pytest.warns(QcliWarning, match="no nvcc; plain torch runs in its place: install it"):
        assert _on_cuda(lambda x: another((), (1,), 32, 0, x), lambda x: "reference")(Tensor(0)) == "reference"
    there.gpu.refuse["cuLaunchKernel"] = "unspecified launch failure"
    with pytest.raises(KernelError):  # any other failure is one
        run(Tensor(0))


def test_torch_without_cuda(install, monkeypatch):
    there = install(Gpu())
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.warns(QcliWarning, match="this torch was built without CUDA; install a CUDA build of torch"):
        assert not cuda.serves(Tensor(0))
    assert there.gpu.calls == []


def test_torch_without_the_quick_question_for_its_stream(install, monkeypatch):
    there = install(Gpu())
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    assert cuda.serves(Tensor(0))
    there.current.handles[0] = cuda.capture_stream(FIRST).cuda_stream
    run(Tensor(), 1)
    assert there.gpu.launches[0].stream == there.current.handles[0]


class Broken:
    """An importer that finds PyCUDA broken."""

    def __init__(self, error: Exception):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pycuda":
            raise self.error
        return None


@pytest.mark.parametrize(
    "error, what, cure",
    [
        (ModuleNotFoundError("No module named 'pycuda'"), "is not installed", "pip install 'qcli[cuda]'"),
        (ImportError("libcuda.so.1: cannot open shared object file: No such file or directory"), "finds no driver", "--gpus all"),
        (ImportError("_driver.so: undefined symbol: cuCtxCreate_v4"), "another version of CUDA", "--force-reinstall"),
        (ImportError("libcurand.so.10: cannot open shared object file"), "another version of CUDA", "--no-cache-dir pycuda"),
        (ModuleNotFoundError("No module named 'pycuda._driver'"), "another Python or numpy", "--force-reinstall"),
        (ImportError("numpy.core.multiarray failed to import"), "another Python or numpy", "--force-reinstall"),
        (ValueError("numpy.ndarray size changed"), "another Python or numpy", "--force-reinstall"),
        (ModuleNotFoundError("No module named 'pytools'"), "lacks a package", "pip install 'qcli[cuda]'"),
        (OSError("strange"), "cannot be imported", "--force-reinstall"),
    ],
)
def test_a_pycuda_that_cannot_be_imported(error, what, cure, install, monkeypatch):
    install(Gpu())
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not cuda.serves(Tensor(0)) and not cuda.serves(Tensor(1))
    assert {str(warning.message) for warning in told} == {str(told[0].message)}
    problem = cuda.problem(FIRST)
    assert what in problem.message and str(error) in problem.message and cure in problem.hint


def test_what_an_op_checks_of_its_tensors():
    assert arguments.type_name("op", torch.ones(1, dtype=torch.float16)) == "__half"
    with pytest.raises(TypeError, match="op: weight is torch.float64, expected float32"):
        arguments.type_name("op", torch.ones(1, dtype=torch.float64), "weight")
    with pytest.raises(ValueError, match="op: x is on cpu, expected cuda:0"):
        arguments.require("op", "x", torch.ones(2), torch.float32, 2, FIRST)
    with pytest.raises(ValueError, match="op: x has 2 elements of torch.float32, expected 3 of torch.float32"):
        arguments.require("op", "x", torch.ones(2), torch.float32, 3, torch.device("cpu"))
    shifted = torch.arange(9.0)[1:]
    assert shifted.data_ptr() % 16 and arguments.aligned(shifted).data_ptr() % 16 == 0
    assert torch.equal(arguments.aligned(shifted), shifted)
