import pytest
import torch


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles parts of its CPU path for every new shape: here the plain functions run."""
    with torch.compiler.set_stance("force_eager"):
        yield
