import os

import pytest
import torch

from qcli.ops import linear_int8
from qcli.runtime import cuda
from tests.gpu.checks import PRODUCTS, compile_all

_HALF, _ALL = ("__nv_bfloat16", "__half"), ("float", "__nv_bfloat16", "__half")
_BLOCK_SIZES = (2, 6, 16, 32, 128, 256, 512, 4096)
_OTHER_BIAS = [(f"DTYPE={x}", f"BIAS={bias}") for x in _ALL for bias in _ALL if x != bias]
# What the tests use beyond the images that a package would carry.
_MORE = {
    **dict.fromkeys(
        ("quantize_4bit", "dequantize_4bit"), [(f"DTYPE={x}", f"BLOCK_SIZE={n}") for x in _ALL for n in _BLOCK_SIZES]
    ),
    "linear_int8": [(*both, f"FULL={full}") for both in _OTHER_BIAS for full in (0, 1)],
    "linear_int8_epilogue": _OTHER_BIAS,
    "linear_int8_gemm": [both for both in _OTHER_BIAS if both[0] != "DTYPE=float"],
    "linear_w8a16": [
        (x, f"FULL={full}", bias) for x, bias in _OTHER_BIAS if x != "DTYPE=float" for full in (0, 1)
    ],
}  # fmt: skip


def pytest_report_header(config):
    if torch.cuda.is_available():
        return (
            f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}; inputs of seed {_SEED} (QCLI_TEST_SEED)"
        )
    return None


_SEED = int(os.environ.get("QCLI_TEST_SEED") or int.from_bytes(os.urandom(3), "little"))


@pytest.fixture(scope="session")
def _ready() -> torch.device:
    """The first GPU, with every kernel compiled. One on which the kernels do not run fails the tests."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    first = torch.device("cuda", 0)
    if problem := cuda.problem(first):
        pytest.fail(f"the kernels do not run on this GPU: {problem.message}; {problem.hint}")
    compile_all(torch.cuda.get_device_capability(first), _MORE)
    return first


@pytest.fixture
def device(_ready) -> torch.device:
    """The GPU, all cores for the references, and fresh random inputs, the same again with the seed that the header shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(_SEED)
    yield _ready
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.set_num_threads(threads)


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch) -> str:
    """LLM.int8() for many tokens on the product that this GPU would take, or on our own."""
    if request.param == "fused":
        fits = lambda x, columns: x.dtype != torch.float32 and columns % 16 == 0  # noqa: E731
        monkeypatch.setattr(linear_int8, "_fuses", fits)
    return request.param
