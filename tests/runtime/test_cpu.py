import os
import re
import subprocess
import sys

import pytest
import torch

from qcli.errors import UsageError
from qcli.runtime import cpu
from tests.conftest import ROOT

BUILT = pytest.mark.skipif(not cpu.variants(), reason="installed without a compiler")


def chosen(**environment) -> str:
    """The variant that a new process takes."""
    code = "import qcli.ops.quantize_4bit; from qcli.runtime import cpu; print(cpu.variant(), cpu.problem())"
    everything = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@BUILT
def test_the_best_variant_comes_last_and_is_taken():
    order = ["generic", "avx2", "avx512", "avx512vnni"]
    assert cpu.variants() == order[: len(cpu.variants())] and cpu.problem() is None
    assert chosen(QCLI_CPU_ISA="") == f"{cpu.variants()[-1]} None"


@BUILT
def test_the_environment_chooses():
    assert chosen(QCLI_CPU_ISA="generic") == "generic None"
    assert chosen(QCLI_CPU_ISA="reference") == "None None"
    assert "QCLI_CPU_ISA is 'sse9'" in chosen(QCLI_CPU_ISA="sse9")


def test_a_library_that_cannot_be_loaded_leaves_the_reference(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    found = chosen(QCLI_CPU_LIBRARY=str(tmp_path / "broken.so"))
    assert found.startswith("None cannot be loaded: ") and "broken.so" in found


def test_a_library_of_another_version_leaves_the_reference():
    import ctypes.util

    found = chosen(QCLI_CPU_LIBRARY=ctypes.util.find_library("c"))
    assert found.startswith("None ") and found.endswith("belongs to another version of qcli")


def test_a_name_that_is_no_variant(monkeypatch):
    monkeypatch.setenv("QCLI_CPU_ISA", "neon")
    with pytest.raises(UsageError) as e:
        cpu._chosen()
    assert "'neon'" in e.value.message and "reference" in e.value.hint


@BUILT
def test_threads_are_those_of_torchs_own_openmp():
    """One OpenMP in the process, and the pool that torch uses: a second would spin against it."""
    assert cpu._torch_openmp()
    with open("/proc/self/maps") as file:
        loaded = set(re.findall(r"/\S*/lib[gi]?omp\S*", file.read()))
    assert len(loaded) == 1 and loaded.pop().startswith(os.path.dirname(torch.__file__))


@BUILT
def test_using_ends_with_what_was_before():
    before = cpu.variant()
    with pytest.raises(RuntimeError), cpu.using("generic"):
        assert cpu.variant() == "generic"
        raise RuntimeError
    assert cpu.variant() == before


def test_tensors_are_checked_before_a_kernel_sees_them():
    with pytest.raises(ValueError, match="op: x has 3 elements of torch.float32, expected 4 of torch.float32"):
        cpu.require("op", "x", torch.ones(3), torch.float32, 4)
    with pytest.raises(ValueError, match="has 5 elements of torch.float32, expected 4"):
        cpu.require("op", "x", torch.ones(5), torch.float32, 4)
    assert cpu.require("op", "x", torch.ones(5), torch.float32, 4, at_least=True).numel() == 5
    with pytest.raises(ValueError, match="expected 1 of torch.uint8"):
        cpu.require("op", "x", torch.ones(3), torch.uint8, 1)
    with pytest.raises(TypeError, match="op: x is torch.int64"):
        cpu.dtype_code("op", torch.ones(3, dtype=torch.int64))
    assert cpu.require("op", "x", torch.ones(4, 4).t()[1:], torch.float32, 12).is_contiguous()


@BUILT
def test_large_results_are_ordinary_tensors():
    for shape in ((0,), (3, 5), (9 << 20,)):
        tensor = cpu.empty(shape, torch.uint8)
        assert tensor.shape == shape and tensor.dtype == torch.uint8
        assert (tensor.fill_(7) == 7).all()


def test_a_record_has_the_alignment_of_c():
    import ctypes

    class Expected(ctypes.Structure):
        _fields_ = [("p", ctypes.c_void_p), ("f", ctypes.c_float), ("q", ctypes.c_int64), ("i", ctypes.c_int)]

    tensor = torch.ones(2)
    record = cpu.Record("pfqi", tensor, 0.5, -3, True)
    found = Expected.from_address(record.address)
    assert (found.p, found.f, found.q, found.i) == (tensor.data_ptr(), 0.5, -3, 1)
    assert Expected.from_address(cpu.Record("pfqi", None, 0.0, 0, 0).address).p is None


def test_the_largest_cache():
    size = cpu.last_level_cache()
    assert size >= 1 << 18
    stated = [int(value) for value in re.findall(r"^ *(\d+)$", _lscpu(), re.MULTILINE)]
    assert not stated or size == max(stated)


def _lscpu() -> str:
    """The sizes of the caches in bytes, one a line. getconf asks the CPU, which in a virtual machine may state the host's."""
    try:
        return subprocess.run(["lscpu", "--bytes", "--caches=ONE-SIZE"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
