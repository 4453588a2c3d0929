"""compute-sanitizer on every kernel, one tool per test, with a time limit: `make test-gpu ARGS="-m slow -k memcheck"`."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.gpu.every_kernel import entries
from tests.gpu.sanitizer import ENVIRONMENT, SECONDS, TOOLS, command

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def reports(output: str, tool: str) -> list[str]:
    """The findings. Of initcheck only those that name a kernel of ours: torch's own kernels read values that they never use."""
    found = re.findall(r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)\S.*(?:\n=+ {5,}.*)*", output, re.MULTILINE)
    if tool != "initcheck":
        return found
    ours = re.compile(rf"\b({'|'.join(sorted(entries()))})\b")
    return [report for report in found if ours.search(report)]


def run(words: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """(exit status, output) of a command. The status is None if its time was over: it was then ended with all its processes."""
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool's own child would hold the GPU
            return None, process.communicate()[0]


@pytest.mark.parametrize("tool", TOOLS)
def test_no_report(tool, device):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on PATH")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    status, output = run(command(tool, sys.executable), environment, SECONDS)
    assert status is not None, f"{tool} was not finished within {SECONDS} s:\n{output[-2000:]}"
    assert "kernels launched" in output and "SUMMARY" in output, output[-4000:]
    found = reports(output, tool)
    assert not found, "\n".join(found[:5])
