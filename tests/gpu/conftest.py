import os

import pytest
import torch

from qcli.ops import linear_int8
from qcli.runtime import cuda
from tests.gpu.checks import PRODUCTS, compile_all
from tests.gpu.images import MORE


def pytest_terminal_summary(terminalreporter):
    """Shows the GPU and the seed at the end: a header would not be shown with -q."""
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        terminalreporter.write_line(f"GPU: {where}; inputs of seed {_SEED} (QCLI_TEST_SEED)")


_SEED = int(os.environ.get("QCLI_TEST_SEED") or int.from_bytes(os.urandom(3), "little"))


@pytest.fixture(scope="session")
def _ready() -> torch.device:
    """The first GPU, with every kernel compiled. If the kernels do not run on it, the tests fail."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    first = torch.device("cuda", 0)
    if problem := cuda.problem(first):
        pytest.fail(f"the kernels do not run on this GPU: {problem.message}; {problem.hint}")
    compile_all(torch.cuda.get_device_capability(first), MORE)
    return first


@pytest.fixture
def device(_ready) -> torch.device:
    """The GPU, with all cores for the references and with new random inputs. The seed shown at the end repeats them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(_SEED)
    yield _ready
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.set_num_threads(threads)


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch) -> str:
    """LLM.int8() for many tokens with the product that is chosen for this GPU, or with our own."""
    if request.param == "fused":
        fits = lambda x, columns: x.dtype != torch.float32 and columns % 16 == 0  # noqa: E731
        monkeypatch.setattr(linear_int8, "_fuses", fits)
    return request.param
