"""Faults planted in copies of the kernels. The interpreter says what is wrong and where."""

import shutil
from importlib import import_module

import pytest
import torch

from qcli.runtime import cuda, nvcc
from tests.emulator.emulator import KERNELS, Emulator, missing
from tests.gpu.checks import wrong
from tests.ptx.backend import Interpreter
from tests.ptx.lanes import Fault

pytestmark = pytest.mark.skipif(nvcc.find() is None, reason="needs nvcc")

CPU = torch.device("cpu")


def planted(folder, file: str, right: str, fault: str):
    """The folder of a copy of the sources with one change."""
    sources = folder / "kernels"
    shutil.copytree(KERNELS, sources)
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, fault))
    return sources


def first_case(name: str, part: str) -> dict:
    """Arguments of the first of an op's own cases whose id contains `part`."""
    return next(arguments for case, arguments in import_module(f"qcli.ops.{name}").cases() if part in case)


def test_operands_that_change_places_in_the_text_of_an_instruction(tmp_path, compiled, emulated):
    """The emulator has its own version of the instruction, so it cannot see the fault."""
    right = "m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0"
    sources = planted(tmp_path, "ptx.cuh", right, right.replace("%5, %6", "%6, %5"))
    arguments = first_case("linear_4bit", "bfloat16-nested-1x2304x40")
    with Interpreter(tmp_path, sources=sources).running():
        assert "result 0 differs at" in wrong("linear_4bit", arguments, CPU)
    with Interpreter(compiled).running():
        assert wrong("linear_4bit", arguments, CPU) is None
    if not missing():
        with cuda.using(Emulator(emulated, sources=sources)):
            assert wrong("linear_4bit", arguments, CPU) is None


FAULTS = {
    "a vector in shared memory that is not aligned": (
        ("linear_int8_epilogue.cu", "__shared__ __align__(16) float w_kept", "__shared__ float w_kept"),
        ("linear_int8", "bfloat16-6.0-20x1040", (9, 0)),
        r"linear_int8_epilogue, linear_int8_epilogue\.cu:\d+, block \(0, 0, 0\), thread 0: 16 bytes at 0x\w+, no multiple of 16",
    ),
    "a vector in global memory one element further": (
        (
            "common.cuh",
            "expand8<T>(__ldg(reinterpret_cast<const uint4*>(from)), to);",
            "expand8<T>(__ldg(reinterpret_cast<const uint4*>(from + 1)), to);",
        ),
        ("quantize_int8", "bfloat16-0.0", (9, 0)),
        r"16 bytes at 0x\w+, no multiple of 16 \(ld\.global\.nc\.v4\.u32",
    ),
    "an element after the end of an array in shared memory": (
        ("linear_int8_epilogue.cu", "found[warp] = __popc(votes)", "found[warp + 1] = __popc(votes)"),
        ("linear_int8", "bfloat16-6.0-20x1040", (9, 0)),
        r"list_outliers, .*thread 992: a write of 4 bytes at byte 128 of \w*found, an array in shared memory of 128 bytes",
    ),
    "an element after the end of a tensor": (
        ("dequantize_absmax.cu", "if (i < count)", "if (i <= count)"),
        ("dequantize_absmax", "1000", (9, 0)),
        r"of 1 bytes at byte (\d+) of an array of \1: outside of all that the launch was given",
    ),
    "threads that return before a barrier": (
        ("quantize_absmax.cu", "  __syncthreads();\n", "  if (i >= count) return;\n  __syncthreads();\n"),
        ("quantize_absmax", "1000", (9, 0)),
        r"divergent barrier: \d+ of 256 threads of a block wait here, \d+ have returned \(bar\.sync",
    ),
    "a read before its copy has been waited for": (
        ("linear_int8_gemm.cu", "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();"),
        ("linear_int8", "bfloat16-0.0-130x400", (8, 0)),
        r"linear_int8_gemm, .*which an asynchronous copy that nobody has waited for is to fill \(ldmatrix",
    ),
    "a missing barrier after the wait for copies": (
        ("linear_4bit_batch.cu", "__syncthreads();  // this turn has arrived, and all threads have finished the previous one", ""),
        ("linear_4bit", "bfloat16-nested-12x320", (8, 0)),
        r"linear_4bit_batch, .*of table_bytes, .*which another warp touches without a barrier between",
    ),
    "shared memory that nobody has written": (
        ("quantize_absmax.cu", "if (threadIdx.x % 32 == 0)", "if (threadIdx.x % 64 == 0)"),
        ("quantize_absmax", "1000", (9, 0)),
        r"thread 0: a read of 4 bytes at byte 4 of \w*warp_max, .* of 32 bytes, which nobody has written",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path):
    change, (name, part, capability), message = FAULTS[fault]
    arguments = first_case(name, part)
    with Interpreter(tmp_path, sources=planted(tmp_path, *change), capability=capability).running():
        with pytest.raises(Fault, match=message):
            wrong(name, arguments, CPU)


def test_no_fault_is_found_where_none_is(compiled):
    """The kernels above have no fault before one is planted."""
    every = {(name, part, capability) for _, (name, part, capability), _ in FAULTS.values()}
    for name, part, capability in every:
        with Interpreter(compiled, capability=capability).running():
            assert wrong(name, first_case(name, part), CPU) is None
