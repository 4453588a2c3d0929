import numpy as np
import pytest
import torch

from qcli import codebooks
from qcli.ops.error_4bit import cases, error_4bit
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.packing import unpack_4bit


def oracle(x, packed, absmax, block_size, quant_type):
    """The definition in numpy and float64."""
    w = x.flatten().double().numpy()
    code = codebooks.CODEBOOKS[quant_type][unpack_4bit(packed, w.size).numpy()]
    with np.errstate(all="ignore"):
        stored = (code * absmax.numpy().repeat(block_size)[: w.size]).astype(np.float64)
        error = w - stored
    error[~np.isfinite(error)] = 0
    norm = np.where(np.isfinite(w), w, 0)
    starts = np.arange(0, w.size, block_size)
    blocks = [np.add.reduceat(part, starts) if w.size else starts for part in (code * error, code.astype(float) ** 2)]
    return (error**2).sum(), (norm**2).sum(), (~np.isfinite(w)).sum(), *blocks


def check(arguments):
    sums, slope, curve = error_4bit(**arguments)
    error, norm, nonfinite, slopes, curves = oracle(**arguments)
    assert sums.dtype == torch.float64 and slope.dtype == curve.dtype == torch.bfloat16
    assert sums.tolist() == pytest.approx([error, norm, nonfinite], rel=2e-6)
    assert curve.double().tolist() == pytest.approx(curves.tolist(), rel=2.0**-7)
    size = arguments["absmax"].double().nan_to_num(0, 0, 0) * arguments["block_size"]
    assert ((slope.double() - torch.from_numpy(np.asarray(slopes))).abs() <= 2.0**-7 * size).all()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases(name, arguments):
    check(arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_left_out(bad):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[3, 5] = x[3, 9] = x[30, 63] = bad
    packed, absmax = quantize_4bit(x, 64, "nf4")
    arguments = {"x": x, "packed": packed, "absmax": absmax, "block_size": 64, "quant_type": "nf4"}
    check(arguments)
    assert error_4bit(**arguments)[0][2] == 3


def test_what_is_stored_exactly_has_no_error():
    x = torch.from_numpy(codebooks.NF4).repeat(16).view(4, 64) * 3
    packed, absmax = quantize_4bit(x, 64, "nf4")
    assert error_4bit(x, packed, absmax, 64, "nf4")[0].tolist()[0] == 0


def test_another_absmax_is_foretold():
    """Sum (w - v)^2 - 2 d slope + d^2 curve is the squared error with absmax + d."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    packed, absmax = quantize_4bit(x, 64, "nf4")
    sums, slope, curve = error_4bit(x, packed, absmax, 64, "nf4")
    d = 0.05
    foretold = sums[0] - 2 * d * slope.double() + d * d * curve.double()
    actual = error_4bit(x, packed, absmax + d, 64, "nf4")[0][0]
    assert foretold.item() == pytest.approx(actual.item(), rel=1e-2)
