"""The overhead's range holds what was published."""

import pytest

from qcli.errors import UsageError
from qcli.memory.costs.overhead import overhead

GIB = 2**30


def test_the_range_is_that_of_published_measurements():
    found = overhead(16 * 10**9, 10**9)
    assert 0.1 * GIB < found.low < 0.2 * GIB < found.likely < 1.1 * GIB < found.high < 2 * GIB
    assert found.low <= 141 * 2**20 + 2 * 8_519_680  # a T4 with torch 2.10 to 2.14
    low, _, high = found.components["CUDA context and kernels"]
    assert low < 287_047_680 < 666_632_192 <= high  # pytorch#86509: kernels loaded lazily, and all


def test_columns_sum_up():
    for found in (overhead(1, 1), overhead(1, 1, device="cpu"), overhead(10**11, 10**10, "vllm", hopper=True)):
        columns = [sum(column) for column in zip(*found.components.values(), strict=True)]
        assert columns == [found.low, found.likely, found.high]
        assert len(found.formula) == len(found.components)


def test_fragmentation_grows_with_what_comes_and_goes():
    assert overhead(0, 10**9).components["fragmentation"] == (0, 256 * 2**20, 512 * 2**20)
    assert overhead(10**11, 10**10).components["fragmentation"] == (0, 5 * 10**8, 5_500_000_000)


def test_hopper_has_a_larger_workspace():
    assert overhead(0, 0, hopper=True).components["cuBLAS workspaces"] == (33_554_432, 67_108_864, 67_108_864)


def test_what_is_asked_wrongly():
    with pytest.raises(UsageError, match="device is 'tpu', expected one of cuda, cpu"):
        overhead(0, 0, device="tpu")
