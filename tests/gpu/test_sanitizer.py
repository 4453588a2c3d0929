"""compute-sanitizer over every kernel, each tool for itself and within a time: `make test-gpu ARGS="-m slow -k memcheck"`."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.gpu.every_kernel import entries

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SECONDS = 180  # of a tool


def reports(output: str, tool: str) -> list[str]:
    """What was found: of initcheck only what names a kernel of ours, for torch's own kernels read what they never use."""
    found = re.findall(
        r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)\S.*(?:\n=+ {5,}.*)*", output, re.MULTILINE
    )
    if tool != "initcheck":
        return found
    ours = re.compile(rf"\b({'|'.join(sorted(entries()))})\b")
    return [report for report in found if ours.search(report)]


def run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit status and output of a command; None where it was ended, with all that it had started, when its time was over."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool's own child would hold the GPU
            return None, process.communicate()[0]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_no_report(tool, device):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on PATH")
    # Torch's allocator would hide an access beyond a tensor inside its own larger block.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    if tool == "memcheck":  # torch asks the driver for what it may not have, and takes no for an answer
        command += ["--report-api-errors", "no"]
    status, output = run([*command, sys.executable, "-m", "tests.gpu.every_kernel"], environment, SECONDS)
    assert status is not None, f"{tool} was not done within {SECONDS} s:\n{output[-2000:]}"
    assert "kernels launched" in output and "SUMMARY" in output, output[-4000:]
    found = reports(output, tool)
    assert not found, "\n".join(found[:5])
