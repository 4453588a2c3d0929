import numpy as np
import pytest
import torch

from qcli.ops.error_int8 import cases, error_int8
from qcli.ops.quantize_int8 import quantize_int8


def oracle(x, q, absmax):
    rows = x.double().numpy().reshape(-1, x.shape[-1])
    with np.errstate(all="ignore"):
        error = rows - q.numpy().reshape(rows.shape) * (absmax.numpy().astype(np.float64) / 127)[:, None]
    error[~np.isfinite(error)] = 0
    norm = np.where(np.isfinite(rows), rows, 0)
    return [(error**2).sum(), (norm**2).sum(), (~np.isfinite(rows)).sum()]


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases(name, arguments):
    sums = error_int8(**arguments)
    assert sums.dtype == torch.float64 and sums.tolist() == pytest.approx(oracle(**arguments), rel=2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_left_out(bad):
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    x[3, 5] = x[3, 9] = x[30, 69] = bad
    q, absmax, _ = quantize_int8(x, 0.0)
    sums = error_int8(x, q, absmax)
    assert sums[2] == 3 and sums.tolist() == pytest.approx(oracle(x, q, absmax), rel=2e-6)


def test_long_rows():
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, absmax, _ = quantize_int8(x, 0.0)
    assert error_int8(x, q, absmax).tolist() == pytest.approx(oracle(x, q, absmax), rel=2e-6)
