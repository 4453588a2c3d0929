"""The launcher through the real PyCUDA, on a driver library that only answers and notes what it was asked (libcuda.c)."""

import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runtime.fake_gpu import driver_library

pytestmark = pytest.mark.skipif(find_spec("pycuda") is None or shutil.which("gcc") is None, reason="needs PyCUDA and a C compiler")

# What every session begins with: torch's part is a fake, the image is one that libcuda.c takes for one.
BEGIN = """
import ctypes, os, sys, threading, torch
from qcli.errors import KernelError
from qcli.runtime import cuda, nvcc
from tests.runtime import fake_gpu
gpu, current = fake_gpu.Gpu(), fake_gpu.Current()
for where, name, value in fake_gpu.torch_parts(gpu, current):
    setattr(where, name, value)
nvcc.find, nvcc.image = lambda: "nvcc", lambda source, constants, capability: b"\\x7fELF" + bytes(60)
driver, T = ctypes.CDLL("libcuda.so.1"), fake_gpu.Tensor
some = cuda.kernel("some", "pqift")
def run(device=0, shared=0, threads=64, kernel=some):
    kernel((), (2, 3), threads, shared, T(device), 5, -1, 0.5, b"eight by")
"""
ARGUMENTS = struct.pack("@Pqif8s", 0x7000, 5, -1, 0.5, b"eight by").hex()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The folder of a libcuda.so.1."""
    return driver_library(tmp_path_factory.mktemp("driver")).parent


@pytest.fixture
def session(library, tmp_path):
    """Runs a session; returns it, and what the driver was asked, a line a call."""

    def run(code: str, **environment) -> tuple[subprocess.CompletedProcess, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        paths = os.pathsep.join([str(ROOT), str(Path(find_spec("pycuda").origin).parents[1])])
        everything = {"PYTHONPATH": paths, "LD_LIBRARY_PATH": str(library), "FAKE_CUDA_LOG": str(log)}
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", BEGIN + code],
            env=os.environ | everything | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, log.read_text().splitlines()

    return run


def test_launches_on_every_kind_of_stream_and_a_clean_exit(session):
    done, log = session("""
assert cuda.serves(T(0)) and cuda.serves(T(1))
run()
run(1, threads=256)
stream = cuda.capture_stream(torch.device("cuda", 1))
current.handles[1] = stream.cuda_stream
run(1)
current.handles[0] = gpu.new_stream(0)
run()
run()
print([call[0] for call in gpu.calls], driver.fakeDepth())
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "['wait', 'wait', 'wait', 'wait'] 0"
    one = f"launch some device=%d grid=2,3,1 block=%d,1,1 shared=0 stream=%d arguments={ARGUMENTS}"
    launches = [(0, 64, -1), (1, 256, -1), (1, 64, 0), (0, 64, 1), (0, 64, 1)]
    assert [line for line in log if line.startswith("launch")] == [one % launch for launch in launches]
    assert "stream 0 device=1 flags=1" in log and "stream 1 device=0 flags=1" in log
    assert [line for line in log if line.startswith("retain")] == ["retain 0", "retain 1"]
    assert log[-2:] == ["release 0", "release 1"]
    assert not any(line.startswith("detach") for line in log)


def test_threads_come_and_go_and_torchs_context_stays(session):
    done, log = session("""
driver.fakeSetDevice(1)
def work(i):
    assert cuda.serves(T(i % 2))
    run(i % 2)
    if i == 3:
        cuda.capture_stream(torch.device("cuda", 0))
for i in range(8):
    thread = threading.Thread(target=work, args=(i,))
    thread.start()
    thread.join()
run(0)
device = ctypes.c_int(-1)
print(driver.cuCtxGetDevice(ctypes.byref(device)), device.value, driver.fakeDepth())
""")
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", "0 1 1")
    assert [line.split()[2] for line in log if line.startswith("launch")] == ["device=0", "device=1"] * 4 + ["device=0"]
    assert log[-2:] == ["release 0", "release 1"]


def test_shared_memory_and_errors(session):
    done, log = session("""
assert cuda.serves(T(0))
run(shared=50000)
run(shared=60000)
run(shared=60000)
for options in ({"shared": 300000}, {"threads": 2048}, {"kernel": cuda.kernel("some", "pqift", "failing")},
                {"kernel": cuda.kernel("some", "pqift", "missing")}):
    try:
        run(**options)
    except KernelError as e:
        print(e)
nvcc.image = lambda *what: b"nothing"
try:
    run(kernel=cuda.kernel("bad", "pqift"))
except KernelError as e:
    print(e)
run()
""")
    assert (done.returncode, done.stderr) == (0, "")
    large, wide, failing, missing, image = done.stdout.splitlines()
    assert large.endswith("cuFuncSetAttribute failed: invalid argument") and "300000 bytes" in large
    assert wide.endswith("cuLaunchKernel failed: invalid argument") and "block (2048, 1, 1)" in wide
    assert failing.startswith("failing on cuda:0") and failing.endswith("unspecified launch failure")
    assert missing.startswith("the driver of cuda:0 cannot load missing of some.cu: cuModuleGetFunction failed")
    assert image.startswith("the driver of cuda:0 cannot load bad of bad.cu: cuModuleLoadDataEx failed")
    assert [line for line in log if line.startswith("room")] == ["room some 50000", "room some 60000"]
    assert sum(line.startswith("launch") for line in log) == 4


@pytest.mark.parametrize("end, code", [("sys.exit(3)", 3), ("raise ValueError('end')", 1)])
def test_an_early_end_gives_the_context_back_too(end, code, session):
    done, log = session(f"assert cuda.serves(T(0))\ncuda.capture_stream(torch.device('cuda', 0))\nrun()\n{end}\n")
    assert done.returncode == code and "PyCUDA" not in done.stderr
    assert log[-1] == "release 0"


def test_an_end_while_another_thread_still_launches(session):
    done, log = session("""
assert cuda.serves(T(0))
def work():
    while cuda.serves(T(0)):
        run()
threading.Thread(target=work, daemon=True).start()
while len(open(os.environ["FAKE_CUDA_LOG"]).readlines()) < 20:
    pass
""")
    assert done.returncode == 0 and "PyCUDA" not in done.stderr
    assert "release 0" in log


def test_a_driver_without_a_gpu(session):
    done, log = session("print(cuda.serves(T(0)), cuda.problem(torch.device('cuda', 0)))", FAKE_CUDA_INIT="100")
    assert done.returncode == 0 and log == []
    assert done.stdout.startswith("False PyCUDA gets no context of the driver: cuInit failed: no CUDA-capable device")
    assert "QcliWarning: no CUDA kernels, plain torch runs" in done.stderr


def test_no_driver_library(session, tmp_path):
    code = "print(cuda.serves(T(0)), cuda.problem(torch.device('cuda', 0)))"
    done, _ = session("", LD_LIBRARY_PATH=str(tmp_path))
    assert "libcuda.so.1" in done.stderr  # nothing of that name lies elsewhere on this machine: else the next is no test
    begin = BEGIN.replace('ctypes.CDLL("libcuda.so.1")', "None")
    paths = os.pathsep.join([str(ROOT), str(Path(find_spec("pycuda").origin).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", begin + code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("False PyCUDA finds no driver (libcuda.so.1: cannot open shared object file")
