import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_int8 import cases, quantize_int8
from qcli.runtime import cpu


def oracle(x, threshold):
    """The rule in numpy, row by row, by float32 operations."""
    x = x.float().numpy()
    x = x.reshape(-1, x.shape[-1])
    outlier = np.abs(x) >= np.float32(threshold) if threshold > 0 else np.zeros(x.shape, bool)
    columns = outlier.any(0)
    q = np.zeros(x.shape, np.int8)
    absmax = np.zeros(len(x), np.float32)
    for i, row in enumerate(x):
        absmax[i] = np.abs(row[~outlier[i]]).max(initial=np.float32(0))
        kept = np.where(columns, np.float32(0), row)
        if absmax[i] >= 1e-30:
            q[i] = np.rint(kept * (np.float32(1) / absmax[i] * np.float32(127)))
        elif absmax[i] > 0:
            q[i] = np.rint(kept.astype(np.float64) * (127 / float(absmax[i])))
    return q, absmax, columns


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_oracle(name, arguments):
    q, absmax, outliers = quantize_int8(**arguments)
    expected = oracle(**arguments)
    assert q.shape == arguments["x"].shape and q.dtype == torch.int8
    assert np.array_equal(q.numpy().reshape(expected[0].shape), expected[0])
    assert np.array_equal(absmax.numpy(), expected[1])
    assert np.array_equal(outliers.numpy(), expected[2])


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("shape", [(1, 300), (200, 300), (700, 128)])
def test_equal_to_bitsandbytes_where_float16_represents_the_values(threshold, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    x[0, 7] = 9
    expected_q, expected_absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=threshold)
    for dtype in (torch.float16, torch.float32):
        q, absmax, outliers = quantize_int8(x.to(dtype), threshold)
        assert torch.equal(q, expected_q) and torch.equal(absmax, expected_absmax)
        assert outliers.nonzero().flatten().tolist() == ([] if columns is None else columns.tolist())


def test_the_factor_is_a_reciprocal_times_127():
    """1.875 is half of 3.75: 63.5 of 127, which the quotient 127 / 3.75 rounds down and the reciprocal rounds up."""
    x = torch.tensor([[3.75, 1.875]]).half()
    assert np.rint(np.float32(1.875) * (np.float32(127) / np.float32(3.75))) == 63
    assert bnb.int8_vectorwise_quant(x)[0].tolist() == quantize_int8(x, 0.0)[0].tolist() == [[127, 64]]


def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_int8(x, 0.0)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_a_value_on_the_threshold_is_an_outlier():
    x = torch.tensor([[6.0, 1.0, 2.0], [0.5, 5.9, -6.0]])
    q, absmax, outliers = quantize_int8(x, 6.0)
    assert outliers.tolist() == [True, False, True]
    assert absmax.tolist() == [2.0, np.float32(5.9)]  # a row leaves out its own outliers only
    assert q.tolist() == [[0, 64, 0], [0, 127, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e5, 3e38])
def test_values_beyond_float16(dtype, magnitude):
    x = torch.tensor([[magnitude, -magnitude, magnitude * 0.75, 1.0]]).to(dtype)
    q, absmax, _ = quantize_int8(x, 0.0)
    assert q.tolist() == [[127, -127, 95, 0]] and absmax.item() == x[0, 0].item()
    assert dequantize_int8(q, absmax, dtype).isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-29, 9e-31, 3e-37, 1e-38, 1e-40, 1e-45])
def test_tiny_rows_keep_their_codes(magnitude):
    x = torch.tensor([[1.0, -1.0, 0.75, 0.0]]) * magnitude
    q, absmax, _ = quantize_int8(x, 0.0)
    assert q[0, [0, 1, 3]].tolist() == [127, -127, 0] and absmax[0] == x.abs().max()
    assert q[0, 2] == round(float(x[0, 2].double() / x[0, 0].double()) * 127)
    assert dequantize_int8(q, absmax, torch.float32).isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_rows_without_ordinary_values(threshold):
    x = torch.tensor([[0.0, -0.0, 0.0], [7.0, 8.0, -9.0]])
    q, absmax, _ = quantize_int8(x, threshold)
    assert q[0].tolist() == [0, 0, 0] and absmax[0] == 0
    if threshold:
        assert q[1].tolist() == [0, 0, 0] and absmax[1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_values_spoil_their_row_alone(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    q, absmax, _ = quantize_int8(x, 0.0)
    decoded = dequantize_int8(q, absmax, torch.float32)
    assert torch.equal(q[1], torch.zeros(4, dtype=torch.int8))
    assert decoded[1].isnan().all() and torch.equal(decoded[[0, 2]], x[[0, 2]])


def test_pieces_do_not_show():
    """More rows than one internal piece holds; outlier columns are those of all rows."""
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(1))
    x[299, 5] = 50
    q, absmax, outliers = quantize_int8(x, 6.0)
    expected = oracle(x, 6.0)
    assert outliers.nonzero().tolist() == [[5]]
    assert np.array_equal(q.numpy(), expected[0]) and np.array_equal(absmax.numpy(), expected[1])


def test_without_kernels_a_weight_may_have_gradients():
    """In several pieces: 300 x 512 values."""
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize_4bit(x, 64, "nf4")
    restored = dequantize_4bit(packed, absmax, 64, "nf4", x.shape, x.dtype)
    q, scale, _ = quantize_int8(x, 3.0)
    with cpu.using(None):
        assert torch.equal(dequantize_4bit(packed, absmax.requires_grad_(), 64, "nf4", x.shape, x.dtype), restored)
        found, found_scale, _ = quantize_int8(x.requires_grad_(), 3.0)
    assert torch.equal(found, q) and torch.equal(found_scale, scale)
