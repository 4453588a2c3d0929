import json
import sys
import warnings

import pytest
import torch

from qcli import doctor
from qcli.errors import KernelError
from qcli.runtime import cpu, cuda, nvcc, problems
from tests.runtime import fake_gpu


def test_every_part_is_named(cli):
    done = cli("doctor", "--json")
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert done.returncode == 0 and done.stderr == ""
    parts = (
        "qcli",
        "CPU",
        "CPU kernels",
        "threads",
        "memory",
        "torch",
        "transformers",
        "bitsandbytes",
        "NVIDIA GPU",
        "compressed-tensors",
    )
    assert {*parts, "nvcc", "PyCUDA"} <= found.keys()
    assert found["threads"]["value"] == "1" and "GB/s by 1 thread" in found["memory"]["value"]
    if cpu.variants():
        assert found["CPU kernels"]["value"].startswith(cpu.variants()[-1]) and found["CPU kernels"]["advice"] is None


def test_the_table_and_what_to_do_about_a_choice(cli):
    done = cli("doctor", env={"QCLI_CPU_ISA": "reference"})
    assert done.returncode == 0 and "CPU kernels" in done.stdout
    if cpu.variants():
        assert "off: QCLI_CPU_ISA=reference" in done.stdout and "CPU kernels: unset QCLI_CPU_ISA" in done.stdout


def test_a_library_that_is_not_there(cli, tmp_path):
    done = cli("doctor", env={"QCLI_CPU_LIBRARY": str(tmp_path / "none.so")})
    assert "plain torch runs" in done.stdout and "CPU kernels: unset QCLI_CPU_LIBRARY" in done.stdout


@pytest.mark.parametrize("there, advice", [(None, "apt install g++"), ("libqcli_cpu.so", "install qcli again")])
def test_without_a_compiler(there, advice, monkeypatch):
    monkeypatch.setattr(cpu, "problem", lambda: "not built")
    monkeypatch.setattr(cpu, "path", lambda: there)
    monkeypatch.delenv("QCLI_CPU_LIBRARY", raising=False)
    found = {entry.name: entry for entry in doctor._cpu()}["CPU kernels"]
    assert "plain torch runs" in found.value and advice in found.advice


def test_an_unknown_variant_is_a_sentence(cli):
    done = cli("doctor", env={"QCLI_CPU_ISA": "mmx"})
    assert done.returncode == 2 and "QCLI_CPU_ISA is 'mmx'" in done.stderr


GPU = "NVIDIA H100, 580.95, 81559 MiB"


@pytest.fixture
def gpu_machine(monkeypatch):
    """What doctor finds on a machine with one GPU, on which all is well but for what a test takes away."""
    gpu = fake_gpu.Gpu()
    for where, name, value in fake_gpu.torch_parts(gpu, fake_gpu.Current()):
        monkeypatch.setattr(where, name, value, raising=False)
    for name, module in fake_gpu.pycuda(gpu).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(cuda, "_backend", cuda.PyCuda())
    monkeypatch.setattr(cuda.atexit, "register", lambda function: None)
    monkeypatch.setattr(nvcc, "find", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(nvcc, "version", lambda compiler: "13.0.88")
    monkeypatch.setattr(nvcc, "image", lambda *what: b"image")
    monkeypatch.setattr(doctor, "_version", lambda package: "2026.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def found() -> dict[str, doctor.Finding]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is wrong is said in the table alone
            return {entry.name: entry for entry in doctor._cuda([GPU])}

    found.gpu = gpu
    return found


def test_a_gpu_on_which_the_kernels_run(gpu_machine):
    found = gpu_machine()
    assert {name: entry.value for name, entry in found.items()} == {
        "NVIDIA GPU": GPU,
        "nvcc": "13.0.88, /cuda/bin/nvcc",
        "PyCUDA": "2026.1",
        "CUDA kernels": "on cuda:0",
    }
    assert not any(entry.advice for entry in found.values())


def test_without_pycuda(gpu_machine, monkeypatch):
    def absent():
        raise problems.import_error(ModuleNotFoundError("No module named 'pycuda'"))

    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(cuda, "_import_driver", absent)
    found = gpu_machine()
    assert found["PyCUDA"].advice == "pip install 'qcli[cuda]'" and found["CUDA kernels"].advice is None
    assert found["CUDA kernels"].value.startswith("not on cuda:0: PyCUDA is not installed")


def test_a_pycuda_of_another_cuda(gpu_machine, monkeypatch):
    def broken():
        raise problems.import_error(ImportError("_driver.so: undefined symbol: cuCtxCreate_v4"))

    monkeypatch.setattr(cuda, "_import_driver", broken)
    found = gpu_machine()["CUDA kernels"]
    assert "built for another version of CUDA" in found.value and "pip install --force-reinstall" in found.advice


def test_without_nvcc(gpu_machine, monkeypatch):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(nvcc, "complete", lambda capability: False)
    found = gpu_machine()
    assert found["nvcc"].value == "not installed" and "CUDA toolkit" in found["nvcc"].advice
    assert "there is no nvcc to compile them" in found["CUDA kernels"].value and found["CUDA kernels"].advice is None


def test_without_nvcc_where_the_kernels_came_compiled(gpu_machine, monkeypatch):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(nvcc, "complete", lambda capability: capability == (9, 0))
    found = gpu_machine()
    assert "and not needed" in found["nvcc"].value and found["nvcc"].advice is None
    assert found["CUDA kernels"].value == "on cuda:0"


def test_an_nvcc_that_does_not_work(gpu_machine, monkeypatch):
    def broken(*what):
        raise KernelError("/cuda/bin/nvcc cannot run, asked for its version: Exec format error", problems.NVCC)

    monkeypatch.setattr(nvcc, "version", broken)
    assert "Exec format error" in gpu_machine()["nvcc"].value and "CUDA toolkit" in gpu_machine()["nvcc"].advice


def test_a_compile_that_fails(gpu_machine, monkeypatch):
    def failing(*what):
        raise KernelError("nvcc failed (exit 1) compiling probe.cu: nvcc fatal: no gcc", "apt install g++")

    monkeypatch.setattr(nvcc, "image", failing)
    found = gpu_machine()["CUDA kernels"]
    assert "compiling probe.cu" in found.value and found.advice == "apt install g++"


def test_a_gpu_that_is_too_old(gpu_machine, monkeypatch):
    for where, name, value in fake_gpu.torch_parts(fake_gpu.Gpu(capability=(6, 1)), fake_gpu.Current()):
        monkeypatch.setattr(where, name, value, raising=False)
    found = gpu_machine()["CUDA kernels"]
    assert "compute capability 6.1, the kernels need 7.5 or later; plain torch runs" in found.value


def test_a_driver_that_refuses(gpu_machine):
    gpu_machine.gpu.refuse["cuDevicePrimaryCtxRetain"] = "out of memory"
    found = gpu_machine()["CUDA kernels"]
    assert "cuDevicePrimaryCtxRetain failed: out of memory" in found.value and "driver" in found.advice


@pytest.mark.parametrize(
    "built, hidden, value, advice",
    [
        (None, None, "was built without CUDA", "install a CUDA build of torch"),
        ("13.0", None, "torch for CUDA 13.0 finds none", "update the driver to one for CUDA 13.0"),
        ("13.0", "", "torch for CUDA 13.0 finds none", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_have(built, hidden, value, advice, gpu_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = gpu_machine()
    assert value in found["GPU in torch"].value and advice in found["GPU in torch"].advice
    assert "CUDA kernels" not in found


def test_without_a_gpu_nothing_is_advised(monkeypatch):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = {entry.name: entry for entry in doctor._cuda([])}
    assert found["nvcc"].value == found["PyCUDA"].value == "not installed, and not needed without a GPU"
    assert not any(entry.advice for entry in found.values())
