"""Every CUDA kernel on the emulator, with AddressSanitizer and UBSan, compared with the reference of its op."""

import json
import re
import subprocess
import sys
from importlib import import_module

import pytest

from qcli import ops
from qcli.runtime import cpu, cuda
from tests.conftest import ROOT
from tests.emulator.emulator import KERNELS, Emulator, missing, sanitized
from tests.parity import disagreement

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

# The kernels that each op's cases must reach.
REACHED = {
    "activate": {"activate"},
    "activation_stats": {"activation_stats", "merge_stats"},
    "add_sparse": {"add_sparse"},
    "attend": {"attend", "merge_attention"},
    "dequantize_4bit": {"dequantize_4bit"},
    "dequantize_absmax": {"dequantize_absmax"},
    "dequantize_int8": {"dequantize_int8"},
    "dequantize_table": {"dequantize_table"},
    "linear_4bit": {"linear_4bit", "linear_4bit_batch", "merge_parts"},
    "linear_int8": {"linear_int8", "linear_int8_epilogue", "linear_int8_gemm", "list_outliers"},
    "linear_table": {"linear_table"},
    "linear_w8a16": {"linear_w8a16"},
    "norm": {"norm_rows"},
    "quantize_4bit": {"quantize_4bit"},
    "quantize_absmax": {"quantize_absmax"},
    "quantize_int8": {"find_outliers", "quantize_int8"},
    "rope_append": {"rope_append"},
}


def test_every_kernel_is_reached():
    kernels = {
        name
        for path in KERNELS.glob("*.cu")
        for name in re.findall(r"^KERNEL\s+void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", path.read_text(), re.M)
    }
    assert kernels == set().union(*REACHED.values())
    assert set(REACHED) == {name for name in ops.names() if hasattr(import_module(f"qcli.ops.{name}"), "_cuda")}


def check(name, folder, *cases):
    """Runs tests.emulator.check in a process of its own."""
    command = [sys.executable, "-m", "tests.emulator.check", str(folder), name, *cases]
    done = subprocess.run(command, cwd=ROOT, env=sanitized(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    *wrong, summary = done.stdout.strip().splitlines()
    assert not wrong, "\n".join(wrong[:20])
    found = json.loads(summary)
    assert {kernel.rpartition(" ")[2] for kernel in found["kernels"]} == REACHED[name]
    assert found["launches"] >= (24 if cases else 8)


# The products take longest. They are in a separate file, so that another worker can run them.
@pytest.mark.parametrize("name", [name for name in REACHED if not name.startswith("linear")])
def test_kernels_agree_with_the_reference(name, emulated):
    check(name, emulated)


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_every_case_in_every_order(name, emulated):
    """Before a kernel lands: three times as long as a case in one order."""
    check(name, emulated, "all")


@pytest.mark.parametrize("name", ["quantize_4bit", "dequantize_4bit"])
def test_an_image_for_any_block_size_gives_the_same(name, emulated):
    """A package contains such an image for machines without nvcc."""

    class AnyBlockSize(Emulator):
        def function(self, source, entry, constants, device):
            kept = tuple(constant for constant in constants if not constant.startswith("BLOCK_SIZE"))
            assert kept != constants
            return super().function(source, entry, kept, device)

    op = import_module(f"qcli.ops.{name}")
    cases = [(case, arguments) for case, arguments in op.cases() if "bfloat16" in case]
    assert len({arguments["block_size"] for _, arguments in cases}) >= 4
    with cuda.using(AnyBlockSize(emulated)), cpu.using(None):
        for case, arguments in cases:
            wrong = disagreement(name, arguments, op._cuda(**arguments), op._reference(**arguments))
            assert wrong is None, f"{case}: {wrong}"
