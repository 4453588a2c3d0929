"""gptq_columns against the formula in float64, and what it refuses. Bit-equality of kernels: test_kernels.py."""

import pytest
import torch

from qcli.codebooks import NF4
from qcli.ops._grid import round_entries
from qcli.ops.gptq_columns import cases, gptq_columns

CASE = {name: arguments for name, arguments in cases()}


@pytest.mark.parametrize("name", ["int4-128x80-3", "int3-zero-48x67-48", "nf4-128x80-3", "e4m3-128x80-3"])
def test_each_column_takes_what_the_earlier_ones_owe_it(name):
    """In float64 every column, with the errors of the earlier ones as found, is within rounding of what was rounded."""
    given = CASE[name]
    codes, values, errors = gptq_columns(**given)
    w, upper = given["w"].double(), given["upper"].double()
    owed = torch.triu(upper, 1).t() @ errors.double()
    now = w - owed
    ordinary = w.abs().amax(0) < 1e3  # rows without the huge element of the cases
    found = now - errors.double() * upper.diagonal().unsqueeze(1)
    torch.testing.assert_close(found[:, ordinary], values.double()[:, ordinary], rtol=1e-4, atol=1e-4)
    scale = given["scale"][given["groups"].long()]
    zero = 0.0 if given["zero_point"] is None else given["zero_point"][given["groups"].long()]
    entries = torch.from_numpy(NF4)[codes.int()] if name.startswith("nf4") else codes.float() - zero
    torch.testing.assert_close(values, (entries * scale).to(given["dtype"]).float(), rtol=0, atol=0)


def test_without_correlations_it_is_plain_rounding():
    w = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    scale = torch.full((1, 40), 0.25)
    codes, values, errors = gptq_columns(w, torch.eye(16), scale, None, torch.zeros(16, dtype=torch.int32), "", 4, torch.float32)
    assert torch.equal(codes, (w / 0.25).round().clamp(-8, 7).to(torch.int8))
    assert torch.equal(values, codes.float() * 0.25) and torch.equal(errors, w - values)


@pytest.mark.parametrize("codebook", ["", "nf4", "fp4", "nf3", "e4m3", "e2m1"])
def test_what_is_no_number_has_the_code_of_zero(codebook):
    w = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0]])
    codes, values, _ = gptq_columns(
        w, torch.eye(1), torch.ones(1, 4), None, torch.zeros(1, dtype=torch.int32), codebook, 4, torch.float32
    )
    most = {"": (7, -8), "e4m3": (448, -448), "e2m1": (6, -6)}.get(codebook, (1, -1))
    assert values.tolist() == [[0, *most, 0]]
    assert codes.view(torch.uint8)[0, 0] == codes.view(torch.uint8)[0, 3]


def test_entries_with_zero_points():
    codes, entries = round_entries(torch.tensor([0.5, 1.5, -9.0, 20.0]), torch.tensor(3.0), "", 4)
    assert codes.tolist() == [3, 5, -6, 7] and entries.tolist() == [0, 2, -9, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codebook": "nf5"}, "codebook is 'nf5'"),
        ({"bits": 9}, "bits is 9"),
        ({"upper": torch.eye(5)}, "upper is torch.float32"),
        ({"groups": torch.zeros(16, dtype=torch.int64)}, "groups is torch.int64"),
        ({"zero_point": torch.zeros(2, 40)}, r"zero_point \[2, 40\]"),
        ({"codebook": "nf4", "zero_point": torch.zeros(1, 40)}, "zero points with the codebook nf4"),
        ({"scale": torch.ones(40)}, r"scale is \[40\]"),
    ],
)
def test_what_is_refused(change, message):
    given = {
        "w": torch.zeros(16, 40),
        "upper": torch.eye(16),
        "scale": torch.ones(1, 40),
        "zero_point": None,
        "groups": torch.zeros(16, dtype=torch.int32),
        "codebook": "",
        "bits": 4,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        gptq_columns(**given | change)
