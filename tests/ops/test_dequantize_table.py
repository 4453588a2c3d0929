import numpy as np
import pytest
import torch

from qcli.ops.dequantize_table import cases, dequantize_table
from qcli.packing import pack_planes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bit_of(bits, column, b):
    """Where bit b of the code of a column is in its unit."""
    if bits == 4:
        return 8 * (column % 32) + 4 * (column // 32) + b
    return 128 + column if b == 2 else 8 * (column % 16) + 2 * (column // 16) + b


def values_of(packed, table, absmax, zero_point, bits, block_size, out_features, in_features):
    """The definition in float64."""
    units = np.unpackbits(packed.numpy().reshape(out_features, -1, 8 * bits), -1, bitorder="little").astype(np.int64)
    places = [[bit_of(bits, column, b) for column in range(64)] for b in range(bits)]
    codes = sum(units[..., place] << b for b, place in enumerate(places)).reshape(out_features, -1)[:, :in_features]
    rows = np.arange(out_features)[:, None]
    values = table.double().numpy().reshape(-1, 1 << bits)[rows if table.dim() == 2 else 0 * rows, codes]
    group = np.arange(in_features) // (block_size or in_features)
    if zero_point is not None:
        values = values - zero_point.double().numpy()[:, group]
    if absmax is not None:
        values = values * absmax.double().numpy()[:, group]
    return torch.from_numpy(values)


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_definition(name, arguments):
    found = dequantize_table(**arguments)
    dtype = arguments["dtype"]
    expected = values_of(**{key: value for key, value in arguments.items() if key != "dtype"})
    assert found.dtype == dtype and found.shape == expected.shape
    size = 1.0 if arguments["absmax"] is None else arguments["absmax"].max().item()
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_is_rounded_once(bits, dtype):
    """table * absmax in float32, then one rounding."""
    codes = torch.arange(64).remainder(1 << bits).to(torch.uint8).repeat(2, 1)
    table, absmax = torch.linspace(-1.3, 0.77, 1 << bits), torch.tensor([[0.0123456789], [3.0000002]])
    found = dequantize_table(pack_planes(codes, bits), table, absmax, None, bits, 0, 2, 64, dtype)
    exact = table[codes.long()].double() * absmax.double()
    assert torch.equal(found, exact.float().to(dtype))


def test_non_finite_scales_spoil_their_groups():
    packed = pack_planes(torch.zeros(1, 96, dtype=torch.uint8), 2)
    absmax = torch.tensor([[torch.nan, 1.0, torch.inf]])
    found = dequantize_table(packed, torch.ones(4), absmax, None, 2, 32, 1, 96, torch.bfloat16)
    assert found[0, :32].isnan().all() and (found[0, 32:64] == 1).all() and found[0, 64:].isinf().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, "dequantize_table: bits is 5, expected 2, 3 or 4"),
        ({"block_size": -1}, "dequantize_table: block_size is -1, expected 0 for whole rows, or more"),
        ({"table": torch.ones(8)}, r"dequantize_table: table is \[8\], expected \[4\] or \[2, 4\]"),
    ],
)
def test_what_does_not_fit(change, message):
    given = {"packed": torch.zeros(2, 16, dtype=torch.uint8), "table": torch.ones(4), "absmax": None, "zero_point": None}
    given |= {"bits": 2, "block_size": 0, "out_features": 2, "in_features": 64, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        dequantize_table(**given | change)


def test_no_columns_and_no_rows():
    for rows, columns in ((0, 64), (3, 0)):
        packed = pack_planes(torch.zeros(rows, columns, dtype=torch.uint8), 3)
        assert dequantize_table(packed, torch.ones(8), None, None, 3, 0, rows, columns, torch.float16).shape == (rows, columns)
