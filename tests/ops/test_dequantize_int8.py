import bitsandbytes.functional as bnb
import pytest
import torch

from qcli.ops.dequantize_int8 import dequantize_int8


def all_codes(rows=50):
    q = torch.arange(-127, 128).to(torch.int8).repeat(rows, 1)
    absmax = torch.rand(rows, generator=torch.Generator().manual_seed(0)) * 3
    return q, absmax


def test_within_three_roundings_of_float64():
    q, absmax = all_codes()
    exact = q.double() * absmax.double().unsqueeze(1) / 127
    error = (dequantize_int8(q, absmax, torch.float32).double() - exact).abs()
    assert (error <= exact.abs() * 1.01 * 3 * 2.0**-24).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_rounded_once(dtype):
    q, absmax = all_codes()
    exact = q.double() * absmax.double().unsqueeze(1) / 127
    found = dequantize_int8(q, absmax, dtype)
    half_ulp = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]  # of the larger end of a binade
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 2 * half_ulp * exact.abs() + 2.0**-25).all()
    assert torch.equal(found, dequantize_int8(q, absmax, torch.float32).to(dtype))


def test_agrees_with_bitsandbytes():
    """Their factor 1/127 is ours; they round q * absmax first, we absmax / 127."""
    q, absmax = all_codes()
    theirs = bnb.int8_vectorwise_dequant(q, absmax)
    torch.testing.assert_close(dequantize_int8(q, absmax, torch.float32), theirs, rtol=4 * 2.0**-24, atol=0)


def test_largest_rows_do_not_overflow():
    decoded = dequantize_int8(torch.tensor([[127, -127, 64]], dtype=torch.int8), torch.tensor([3e38]), torch.float32)
    torch.testing.assert_close(decoded, torch.tensor([[3e38, -3e38, 3e38 * 64 / 127]]))
