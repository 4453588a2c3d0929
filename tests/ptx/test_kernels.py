"""The PTX that nvcc makes of every kernel, run lane by lane, compared with the reference of its op."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from qcli.runtime import cuda, nvcc
from tests.emulator.check import TWO_WAYS
from tests.emulator.emulator import SHARED
from tests.emulator.test_kernels import REACHED
from tests.gpu import inputs
from tests.gpu.checks import kernel, wrong
from tests.gpu.images import Asking
from tests.ptx.backend import Interpreter

pytestmark = pytest.mark.skipif(nvcc.find() is None, reason="needs nvcc")

CPU = torch.device("cpu")
# Ops that take another path for many tokens on 8.0, which has no wgmma, and with several multiprocessors.
WAYS = [(name, (9, 0)) for name in REACHED] + [(name, (8, 0)) for name in sorted(TWO_WAYS)]
# On 7.5 a product is several smaller instructions. For 10.0 nvcc uses another compiler.
EVERY = WAYS + [(name, (7, 5)) for name in REACHED if name.startswith("linear")] + [(name, (10, 0)) for name in REACHED]


def launches(name: str, interpreter: Interpreter, arguments: dict) -> set[tuple[str, str]]:
    """The kernels that a call would launch, each with every constant, or with none. Without those of the ops that it calls."""
    asking = Asking(interpreter.of, SHARED[interpreter.of], interpreter.multiprocessors(CPU))
    with cuda.using(asking):
        kernel(name, arguments)
    return {(entry, constant) for _, entry, constants in asking.asked for constant in ("", *constants)}


def of(capability: tuple[int, int], folder: Path) -> Interpreter:
    """An interpreter. Skips if this nvcc does not support such GPUs."""
    if f"sm_{capability[0]}{capability[1]}" not in nvcc.targets():
        pytest.skip(f"this nvcc does not compile for {capability}")
    return Interpreter(folder, capability=capability)


def run(interpreter: Interpreter, name: str, cases) -> dict[str, str]:
    """What is wrong, by case."""
    with interpreter.running():
        return {case: message for case, arguments in cases if (message := wrong(name, arguments, CPU))}


@pytest.mark.parametrize("name, capability", WAYS, ids=str)
def test_a_case_for_each_constant_of_each_kernel(name, capability, compiled):
    interpreter, reached, chosen = Interpreter(compiled, capability=capability), set(), []
    for case, arguments in import_module(f"qcli.ops.{name}").cases():
        kernels = launches(name, interpreter, arguments)
        if kernels - reached:
            reached |= kernels
            chosen.append((case, arguments))
    assert run(interpreter, name, chosen) == {}
    # Each path has its own product for many tokens.
    entries = {entry for entry, _ in reached}
    assert set(interpreter.launched) == entries and entries <= REACHED[name]
    assert len(REACHED[name] - entries) <= 1
    assert not REACHED[name] - entries or name in TWO_WAYS


@pytest.mark.slow
@pytest.mark.parametrize("name, capability", EVERY, ids=str)
def test_an_ops_own_cases(name, capability, compiled):
    """Takes some minutes for all."""
    interpreter = of(capability, compiled)
    assert run(interpreter, name, import_module(f"qcli.ops.{name}").cases()) == {}
    assert interpreter.launched


@pytest.mark.slow
@pytest.mark.parametrize("name, capability", EVERY, ids=str)
def test_hostile_inputs(name, capability, compiled):
    torch.manual_seed(0)
    interpreter = of(capability, compiled)
    assert run(interpreter, name, inputs.hostile(name, (torch.bfloat16, torch.float32))) == {}
    assert interpreter.launched
