import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of what nvcc made, for all tests of a process."""
    return tmp_path_factory.mktemp("ptx")
