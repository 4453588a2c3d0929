"""Host time in microseconds per launch of a CUDA kernel: `python benchmarks/cuda_launch.py`.

The kernel is that of dequantize_4bit, on 64 weights. With a GPU the driver is NVIDIA's. Without one, PyCUDA runs on a driver
library that returns at once (tests/runtime/libcuda.c). The time of a real driver, 1.5 to 2 us, must then be added.
"""

import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from qcli import codebooks  # noqa: E402
from qcli.ops import _library, dequantize_4bit  # noqa: E402
from qcli.runtime import arguments, cuda, nvcc  # noqa: E402
from tests.runtime import fake_gpu  # noqa: E402

CALLS, ROUNDS = 1000, 30
CONSTANTS = ("DTYPE=float", "BLOCK_SIZE=64")


def pretend() -> tuple[fake_gpu.Current, fake_gpu.Gpu]:
    """Makes PyCUDA use the library that returns at once, and installs a backend that treats CPU tensors as GPU tensors."""
    with tempfile.TemporaryDirectory() as folder:
        ctypes.CDLL(str(fake_gpu.driver_library(Path(folder))), ctypes.RTLD_GLOBAL)  # the dynamic linker then finds it loaded
    gpu, current = fake_gpu.Gpu(), fake_gpu.Current()
    for where, name, value in fake_gpu.torch_parts(gpu, current):
        setattr(where, name, value)
    nvcc.find, nvcc.image = lambda: "nvcc", lambda *what: b"\x7fELF" + bytes(60)
    backend = cuda.PyCuda()
    first = torch.device("cuda", 0)
    if backend.problem(first):
        raise backend.problem(first)
    devices = backend._devices
    devices[torch.device("cpu")] = devices[first]
    devices[first].current = lambda index: current.handles[0]
    torch.cuda.current_stream = lambda device: fake_gpu.TorchStream(gpu, current.handles[0], 0)
    cuda._backend = backend
    return current, gpu


def microseconds(function: Callable[[], object]) -> float:
    """Host time per call: the best of several rounds. Between rounds the GPU finishes its work."""
    best = float("inf")
    for _ in range(ROUNDS):
        if REAL:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS):
            function()
        best = min(best, time.perf_counter() - started)
    return best / CALLS * 1e6


REAL = torch.cuda.is_available()


def main() -> None:
    if find_spec("pycuda") is None:
        sys.exit("error: PyCUDA is not installed; pip install 'qcli[cuda]'")
    current, gpu = (None, None) if REAL else pretend()
    device = torch.device("cuda", 0) if REAL else torch.device("cpu")
    if REAL and cuda.problem(device):
        raise cuda.problem(device)
    packed, absmax = torch.zeros(32, dtype=torch.uint8, device=device), torch.ones(1, device=device)
    out, table = torch.empty(64, device=device), codebooks.CODEBOOKS["nf4"].tobytes()
    launch = cuda.kernel("dequantize_4bit", "ppqitp")
    values = (packed, absmax, 64, 64, table, out)
    launch(CONSTANTS, (1,), 256, 0, *values)

    backend, pack = cuda._backend, arguments.packer("ppqitp")
    function = backend.function("dequantize_4bit", "dequantize_4bit", CONSTANTS, device)
    ready = pack(values)
    if REAL:
        op = dequantize_4bit.dequantize_4bit
    else:  # the same registration, for CPU tensors
        schema = "launch_cost(Tensor p, Tensor a, int b, str q, SymInt[] shape, ScalarType dtype) -> Tensor"
        op = _library.define(schema, dequantize_4bit._cuda, dequantize_4bit._fake)

    def bare() -> None:
        function.launch((1, 1, 1), (256, 1, 1), ready, 0, None)

    rows = {
        "packing six arguments": microseconds(lambda: pack(values)),
        "PyCUDA's launch, context pushed, arguments packed": 0.0,
        "the backend's launch, arguments packed": microseconds(
            lambda: backend.launch(function, (1, 1, 1), (256, 1, 1), 0, ready, device)
        ),
        "kernel(...)": microseconds(lambda: launch(CONSTANTS, (1,), 256, 0, *values)),
        "the op, with its checks, its dispatch and a new tensor for the result": microseconds(
            lambda: op(packed, absmax, 64, "nf4", [64], torch.float32)
        ),
    }
    function.device.context.push()
    rows["PyCUDA's launch, context pushed, arguments packed"] = microseconds(bare)
    function.device.context.pop()
    if REAL:
        with torch.cuda.stream(torch.cuda.Stream()):
            rows["kernel(...) on a stream that PyCUDA did not make"] = microseconds(
                lambda: launch(CONSTANTS, (1,), 256, 0, *values)
            )
    driver = f"{torch.cuda.get_device_name()}" if REAL else "a driver that returns at once: no GPU here"
    print(f"us per call on {driver}; PyCUDA {version('pycuda')}, torch {torch.__version__}")
    for name, value in rows.items():
        print(f"{value:8.2f}  {name}")


if __name__ == "__main__":
    main()
