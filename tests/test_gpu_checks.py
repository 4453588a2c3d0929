"""What the tests in tests/gpu rest on, without a GPU: on the emulator's kernels, and on results that are wrong on purpose."""

import os
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch

from qcli.ops import dequantize_int8, quantize_int8
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.runtime import cpu, cuda
from tests.emulator.emulator import Emulator, missing
from tests.gpu import checks, conftest, every_kernel, groups, inputs, test_sanitizer

CPU = torch.device("cpu")
EMULATED = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def emulator(emulated):
    made = Emulator(emulated)
    with cuda.using(made):
        yield made


@EMULATED
@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("name", ["attend", "norm", "quantize_absmax", "quantize_int8", "rope_append"])
def test_hostile_inputs_on_the_emulator(name, form, emulator):
    torch.manual_seed(0)
    for case, arguments in inputs.hostile(name, (torch.float32,)):
        assert checks.wrong(name, arguments, CPU, form) is None, case


@EMULATED
def test_some_rows_of_a_layer_on_the_emulator(emulator):
    torch.manual_seed(0)
    rows = torch.tensor([0, 5, 63])
    four = inputs.layer_4bit(3, 64, 256, torch.bfloat16, bias=torch.bfloat16)
    eight = inputs.layer_8bit(2, 64, 256, torch.bfloat16, outliers=3, bias=torch.bfloat16)
    every = {"linear_4bit": four, "linear_int8": eight, "linear_w8a16": inputs.w8a16(eight)}
    with checks.noting() as launched:
        for name, arguments in every.items():
            assert checks.wrong_in_rows(name, arguments, rows) is None
        for kind in ("int4-zeros", "mxfp4", "nvfp4"):
            assert checks.wrong_in_rows("linear_4bit", groups.four_bits(kind, 3, 64, 256, torch.bfloat16), rows) is None
        for kind in ("int8-zeros", "e4m3-rows"):
            assert checks.wrong_in_rows("linear_w8a16", groups.eight_bits(kind, 3, 64, 256, torch.bfloat16), rows) is None
    assert launched == set(every)
    other = four | {"packed": four["packed"].roll(1)}
    some = checks.of_rows("linear_4bit", other, rows)
    ours = checks.kernel("linear_4bit", four)[..., rows]
    assert "differs" in checks.disagreement("linear_4bit", some, ours, checks.reference("linear_4bit", some))


@EMULATED
def test_every_kernel_is_launched_and_named(emulator):
    assert every_kernel.launch(["quantize_absmax"], CPU) == {"quantize_absmax"}
    assert {"linear_4bit_batch", "list_outliers", "merge_stats", "linear_int8_gemm"} < every_kernel.entries()


@pytest.mark.parametrize("name", checks.KERNELS)
def test_hostile_inputs_are_valid(name):
    """The reference takes each, and finds itself to agree with it."""
    torch.manual_seed(0)
    for case, arguments in inputs.hostile(name, (torch.bfloat16,)):
        result = checks.reference(name, arguments)
        assert checks.disagreement(name, arguments, result, result) is None, case


def test_what_a_kernel_may_not_do_is_noticed(monkeypatch):
    """Leaving elements out, writing to its input, one wrong code."""
    reference = quantize_int8._reference
    arguments = {"x": torch.randn(8, 32), "threshold": 0.0}

    def incomplete(x, threshold):
        q, absmax, outliers = reference(x, threshold)
        made = torch.empty_like(absmax)
        made[:-1] = absmax[:-1]
        return q, made, outliers

    def careless(x, threshold):
        result = reference(x, threshold)
        x[0, 0] = 7
        return result

    def off_by_one(x, threshold):
        q, *rest = reference(x, threshold)
        q[3, 4] ^= 1
        return q, *rest

    for broken, message in (
        (incomplete, "result 1 differs at 1 of 8 places, first [7]: nan"),
        (careless, "wrote to its input x"),
        (off_by_one, "result 0 differs at 1 of 256 places, first [3, 4]"),
        (reference, None),
    ):
        monkeypatch.setattr(quantize_int8, "_cuda", broken)
        found = checks.wrong("quantize_int8", arguments, CPU)
        assert found is None if message is None else message in found
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("form", checks.FORMS)
def test_forms(form):
    x = torch.arange(12.0).view(3, 4)
    (made,) = checks.moved({"x": x}, CPU, form).values()
    assert torch.equal(made, x) and made.data_ptr() != x.data_ptr()
    assert made.is_contiguous() == (form != "strided")
    assert (made.data_ptr() - made.untyped_storage().data_ptr() == 4) == (form == "unaligned")


def test_codes_may_differ_on_a_threshold_only():
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    packed, absmax = quantize_4bit(x, 64, "nf4")
    theirs, _ = bnb.functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    found = lambda other: checks.far_from_thresholds(x, packed, other, absmax, 64, "nf4")  # noqa: E731
    assert found(theirs) == 0
    other = packed.clone()
    other[7] ^= 0x11
    assert found(other) == 2
    near = torch.tensor([1.0, 0.039790149778], dtype=torch.float64).float()  # the threshold between codes 7 and 8
    low, high = (torch.tensor([[0xF0 | code]], dtype=torch.uint8) for code in (7, 8))
    assert checks.far_from_thresholds(near, low, high, torch.ones(1), 2, "nf4") == 0


def test_a_result_that_is_rounded_again_may_be_the_next_one():
    """float16 products in bfloat16: half a unit of the one decides between two of the other."""
    arguments = inputs.layer_4bit(2, 16, 64, torch.float16)
    arguments["x"] = arguments["x"].bfloat16()
    (result,) = checks.reference("linear_4bit", arguments)
    for steps, agrees in ((1, True), (8, False)):
        other = (result.view(torch.int16) + steps).view(torch.bfloat16)
        assert (checks.disagreement("linear_4bit", arguments, other, result) is None) == agrees


REPORT = """========= COMPUTE-SANITIZER
14 kernels launched
========= Invalid __global__ read of size 4 bytes
=========     at {kernel}+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2c0] in libcuda.so.1
=========
========= ERROR SUMMARY: 1 error
"""


def test_reports_of_the_sanitizer_are_read():
    (found,) = test_sanitizer.reports(REPORT.format(kernel="quantize_absmax"), "memcheck")
    assert found.startswith("========= Invalid") and "cuLaunchKernel" in found
    assert test_sanitizer.reports(REPORT.format(kernel="quantize_absmax"), "initcheck") == [found]
    assert test_sanitizer.reports(REPORT.format(kernel="at::native::reduce_kernel"), "initcheck") == []
    race = "========= Error: Race reported between Write access at linear_4bit+0x10 and Read access at linear_4bit+0x20\n"
    assert len(test_sanitizer.reports(race + "========= RACECHECK SUMMARY: 1 hazard displayed\n", "racecheck")) == 1
    quiet = "========= COMPUTE-SANITIZER\n14 kernels launched\n========= ERROR SUMMARY: 0 errors\n"
    assert test_sanitizer.reports(quiet, "memcheck") == []


def test_the_seed_is_shown(monkeypatch):
    lines = []
    reporter = SimpleNamespace(write_line=lines.append)
    conftest.pytest_terminal_summary(reporter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    conftest.pytest_terminal_summary(reporter)
    assert lines == [f"GPU: some GPU, torch {torch.__version__}; inputs of seed {conftest._SEED} (QCLI_TEST_SEED)"]


def ends(process: int) -> bool:
    """Whether a process that was killed is gone, or waits only for its parent to notice."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_sanitizer_has_its_time_and_no_more():
    """What it started ends with it."""
    environment = {"PATH": os.environ["PATH"]}
    assert test_sanitizer.run(["echo", "14 kernels launched"], environment, 60) == (0, "14 kernels launched\n")
    status, output = test_sanitizer.run(["sh", "-c", "sleep 1000 & echo $!; wait"], environment, 0.5)
    assert status is None
    assert ends(int(output))


def test_the_reference_is_torchs_own():
    """Not the CPU's compiled kernel: that one is compared with it elsewhere."""
    q = torch.zeros(1, 4, dtype=torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        original = import_module("qcli.ops.dequantize_int8")._reference
        patch.setattr(dequantize_int8, "_reference", lambda **a: seen.append(cpu.variant()) or original(**a))
        checks.reference("dequantize_int8", {"q": q, "absmax": torch.ones(1), "dtype": torch.float32})
    assert seen == [None]
