"""compute-sanitizer over every kernel."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.gpu.every_kernel import entries

pytestmark = pytest.mark.gpu


def reports(output: str, tool: str) -> list[str]:
    """What was found: of initcheck only what names a kernel of ours, for torch's own kernels read what they never use."""
    found = re.findall(
        r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)\S.*(?:\n=+ {5,}.*)*", output, re.MULTILINE
    )
    if tool != "initcheck":
        return found
    ours = re.compile(rf"\b({'|'.join(sorted(entries()))})\b")
    return [report for report in found if ours.search(report)]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_no_report(tool, device):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on PATH")
    # Torch's allocator would hide an access beyond a tensor inside its own larger block.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    if tool == "memcheck":  # torch asks the driver for what it may not have, and takes no for an answer
        command += ["--report-api-errors", "no"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.every_kernel"], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert "kernels launched" in done.stdout and "SUMMARY" in done.stdout, done.stdout[-4000:]
    found = reports(done.stdout, tool)
    assert not found, "\n".join(found[:5])
