"""nvcc compiles every kernel for the GPUs of 2020 and of 2022, and the code stays within a budget.

budget.json has for each source, and for further forms of it ("source: form"): its constants, the instruction that identifies the
hot loop, the number of elements that a lane processes in one turn of the loop, the limit of instructions per element, and the limit
of registers per thread. No hot loop uses local memory.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

from qcli.runtime import nvcc
from tests.emulator import sass
from tests.emulator.emulator import KERNELS

BUDGET = json.loads(Path(__file__).with_name("budget.json").read_text())
SOURCES = {name.partition(":")[0] for name in BUDGET}
ARCHITECTURES = ["sm_80", "sm_90a"]

pytestmark = pytest.mark.skipif(nvcc.find() is None, reason="needs nvcc")


def compiled(source: str, constants: list[str], architecture: str, folder: Path) -> tuple[Path, str]:
    """(the image, the output of ptxas). Any warning is an error."""
    image = folder / f"{source}.cubin"
    command = [nvcc.find(), "-cubin", f"-arch={architecture}", *nvcc.FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v"]
    defined = [f"-D{constant}" for constant in constants]
    done = subprocess.run([*command, *defined, "-o", image, KERNELS / f"{source}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return image, done.stderr


def test_every_source_has_a_budget():
    assert SOURCES == {path.stem for path in KERNELS.glob("*.cu")}


@pytest.mark.parametrize("architecture", [pytest.param(ARCHITECTURES[0], marks=pytest.mark.slow), ARCHITECTURES[1]])
@pytest.mark.parametrize("name", BUDGET)
def test_budget(name, architecture, tmp_path):
    budget, source = BUDGET[name], name.partition(":")[0]
    image, ptxas = compiled(source, budget["constants"], architecture, tmp_path)
    usage = sass.usage(ptxas)
    kernels = re.findall(r"^KERNEL[^;{]*?(\w+)\(const", (KERNELS / f"{source}.cu").read_text(), re.M)
    assert set(usage) == set(kernels)
    assert max(usage[kernel]["registers"] for kernel in kernels) <= budget["registers"]
    if not budget["hot"]:
        assert not any(usage[kernel]["spilled"] for kernel in kernels)
        return
    if sass.nvdisasm() is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    hot = max(sass.loops(image)[source], key=lambda loop: loop[budget["hot"]])
    assert hot[budget["hot"]] > 0
    assert not hot["LDL"] and not hot["STL"]
    assert hot.total() / budget["elements"] <= budget["per_element"], dict(hot.most_common(12))


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_every_image_that_a_package_carries_compiles(source, tmp_path):
    """Takes minutes: every image for both architectures, without a warning."""
    listed = nvcc.instances(source)
    assert listed
    for constants in listed:
        for architecture in ARCHITECTURES:
            compiled(source, list(constants), architecture, tmp_path)
