import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of compiled kernels, for all tests of a process."""
    return tmp_path_factory.mktemp("ptx")
