import pytest
import torch

from qcli.runtime import cpu


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles parts of its CPU path for every new shape: here the plain functions run."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True, params=[cpu.REFERENCE, *cpu.variants()])
def variant(request):
    """Every test of the ops runs on the reference and on every variant of the kernels that this CPU has."""
    with cpu.using(None if request.param == cpu.REFERENCE else request.param):
        yield request.param
