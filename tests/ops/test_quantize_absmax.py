import math

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qcli import codebooks
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.quantize_absmax import cases, mean_absmax, quantize_absmax


def weights_absmax(count, seed=0):
    """As blocks of a normal weight give it, some with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.randn(count, 64, generator=generator).abs().amax(1) * 0.02
    absmax[::200] *= 10
    return absmax


def nearest(absmax, offset):
    """The nearest entry by exhaustive search in float64, of float32's y * (1 / max|y|); the lower one of a tie."""
    table = codebooks.DYNAMIC_MAP.astype(np.float64)
    for group in absmax.split(256) if absmax.numel() else ():
        y = group.numpy() - np.float32(offset)
        largest = np.abs(y).max()
        if largest >= 1e-38:
            y = y * (np.float32(1) / largest)
        elif largest > 0:
            y = y / largest
        yield from np.abs(y.astype(np.float64)[:, None] - table).argmin(1).tolist()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_take_the_nearest_code(name, arguments):
    codes, nested_absmax = quantize_absmax(**arguments)
    assert codes.tolist() == list(nearest(**arguments))
    y = (arguments["absmax"] - arguments["offset"]).abs()
    assert nested_absmax.tolist() == [group.max().item() for group in y.split(256) if group.numel()]


@pytest.mark.parametrize("count", [1, 100, 256, 257, 20_000])
def test_weights_take_the_nearest_code(count):
    absmax = weights_absmax(count)
    offset = mean_absmax(absmax)
    codes, _ = quantize_absmax(absmax, offset)
    assert codes.tolist() == list(nearest(absmax, offset))


def test_a_tie_takes_the_lower_code():
    midpoints = (codebooks.DYNAMIC_MAP[:-1].astype(np.float64) + codebooks.DYNAMIC_MAP[1:]) / 2
    exact = midpoints[midpoints == midpoints.astype(np.float32)]
    assert len(exact) > 50
    absmax = torch.from_numpy(np.append(exact.astype(np.float32)[:255], np.float32(1)))
    codes, _ = quantize_absmax(absmax, 0.0)
    assert codes[:-1].tolist() == np.flatnonzero(midpoints == midpoints.astype(np.float32))[:255].tolist()


def test_differs_from_bitsandbytes_cpu_by_its_table_only():
    absmax = weights_absmax(40_000)
    offset = mean_absmax(absmax)
    codes, nested_absmax = quantize_absmax(absmax, offset)
    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(nested_absmax, state.absmax)
    assert 0 < (codes != theirs).float().mean() < 0.02
    # Each is then nearest but for the step of its table of 65536 entries over [-1, 1].
    table, y = torch.from_numpy(codebooks.DYNAMIC_MAP), absmax - offset
    scaled = y / nested_absmax.repeat_interleave(256)[: y.numel()]
    further = (table[theirs.int()] - scaled).abs() - (table[codes.int()] - scaled).abs()
    assert further.min() > -1e-7 and further.max() < 2 / 65536


@pytest.mark.parametrize("count", [1, 300])
def test_equal_values_are_kept_exactly(count):
    """max|y| is 0: codes of 0.0, and the offset alone comes back."""
    absmax = torch.full((count,), 0.3)
    codes, nested_absmax = quantize_absmax(absmax, mean_absmax(absmax))
    assert (nested_absmax == 0).all() and (codebooks.DYNAMIC_MAP[codes.numpy()] == 0).all()
    assert torch.equal(dequantize_absmax(codes, nested_absmax, mean_absmax(absmax)), absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_absmax_spoils_its_group_alone(bad):
    absmax = weights_absmax(600)
    absmax[300] = bad
    offset = mean_absmax(absmax)
    decoded = dequantize_absmax(*quantize_absmax(absmax, offset), offset)
    assert not decoded[256:512].isfinite().any()
    rest = torch.cat((absmax[:256], absmax[512:]))
    torch.testing.assert_close(torch.cat((decoded[:256], decoded[512:])), rest, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4097])
def test_mean_is_folded_in_float64(count):
    absmax = weights_absmax(count, seed=count)
    values = absmax.tolist()
    values += [0.0] * (2 ** math.ceil(math.log2(count)) - count)
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:])]
    assert mean_absmax(absmax) == float(np.float32(values[0] / count))
    assert mean_absmax(absmax) == float(np.float32(math.fsum(absmax.tolist()) / count))


def test_mean_of_none_and_of_nonfinite_values():
    assert mean_absmax(torch.empty(0)) == 0.0
    assert mean_absmax(torch.tensor([float("nan"), float("inf")])) == 0.0
    assert mean_absmax(torch.tensor([1.0, float("nan"), 2.0, float("inf"), 6.0])) == 3.0


def test_mean_does_not_depend_on_threads():
    absmax = weights_absmax(100_003)
    threads, seen = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.add(mean_absmax(absmax))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
