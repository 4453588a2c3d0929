"""round_to_table against the nearest of all entries in float64, and what it refuses. Bit-equality of codes: test_kernels.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli.ops.round_to_table import _reference, cases, round_to_table
from tests.ops.test_kernels import matrices


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_it_is_the_nearest_entry(name, arguments):
    codes, sums = round_to_table(**arguments)
    w, table = arguments["x"].double(), arguments["table"].double()
    finite = w.isfinite()
    v = torch.where(finite, w, 0.0)
    distances = (v.unsqueeze(2) - table.unsqueeze(1)).abs()
    found = distances.gather(2, codes.long().unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, distances.amin(2), rtol=1e-6, atol=1e-7)
    error = (w - table.gather(1, codes.long())).square()[finite].sum()
    expected = torch.stack((error, w.square()[finite].sum(), (~finite).sum().double()))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-12)


def test_halfway_the_lower_entry_is_taken():
    codes, _ = round_to_table(torch.tensor([[-9.0, 0.5, 0.5000001, 1.5, 2.5, 9.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    assert codes.tolist() == [[0, 0, 1, 1, 2, 3]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from([4, 8, 16]))
def test_any_matrix_is_as_the_reference(x, entries):
    table = torch.randn(len(x), entries, generator=torch.Generator().manual_seed(0)).sort(1).values
    codes, sums = round_to_table(x, table)
    expected, expected_sums = _reference(x, table)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "x, table, error, message",
    [
        (torch.zeros(8), torch.zeros(1, 4), ValueError, "x has 1 dimensions"),
        (torch.zeros(2, 8).double(), torch.zeros(2, 4), TypeError, "x is torch.float64"),
        (torch.zeros(2, 8), torch.zeros(1, 4), ValueError, r"table is torch.float32 \[1, 4\], expected torch.float32 \[2,"),
        (torch.zeros(2, 8), torch.zeros(2, 5), ValueError, r"table is torch.float32 \[2, 5\]"),
        (torch.zeros(2, 8), torch.zeros(2, 4).half(), ValueError, "table is torch.float16"),
    ],
)
def test_what_is_refused(x, table, error, message):
    with pytest.raises(error, match=message):
        round_to_table(x, table)
