"""fit_table beside the best partition, which dynamic programming over all elements finds. Bit-equality: test_kernels.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli.ops.fit_table import _reference, fit_table
from qcli.ops.round_to_table import round_to_table
from tests.ops.test_kernels import matrices


def weights_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (1 + 2 * (torch.rand(rows, columns, generator=generator) < 0.05))


def best_error(values, mass, entries):
    """The least sum of mass * (value - entry)^2 of a row, by dynamic programming over its sorted elements, in float64."""
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), mass[order].astype(np.float64)
    sums = [np.append(0, np.cumsum(w * x**power)) for power in (0, 1, 2)]
    i, j = np.arange(len(x) + 1)[:, None], np.arange(len(x) + 1)[None, :]
    m, s, q = (np.where(i < j, each[j] - each[i], 0.0) for each in sums)
    cost = np.where(i < j, q - np.divide(s * s, m, out=np.zeros_like(s), where=m > 0), np.where(i == j, 0.0, np.inf))
    found = cost[0]
    for _ in range(entries - 1):
        found = (found[:, None] + cost).min(0)
    return found[-1]


def error_of(rows, table, mass):
    nearest = (rows.double().unsqueeze(-1) - table.double().unsqueeze(1)).abs().amin(-1)
    return (mass.double() * nearest.square()).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_tables_are_near_the_best_there_are(power, dtype, bits):
    """Weights count alike, or by masses of many magnitudes."""
    rows = weights_of(6, 300).to(dtype)
    mass = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)).square() ** power
    table = fit_table(rows, bits, 50, mass if power else None)
    best = torch.tensor([best_error(row.float().numpy(), of.numpy(), 1 << bits) for row, of in zip(rows, mass)])
    ratio = error_of(rows, table, mass) / best
    assert ratio.min() > 1 - 1e-5 and ratio.mean() < 1.005 and ratio.max() < 1.02, ratio


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_a_bin_for_each_value_the_start_is_the_best(bits):
    """One iteration then gives the means of the best partition, for any weights, repeated values, and what does not count."""
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randint(0, 4 << bits, (5, 200), generator=generator).float().square_()
    mass = torch.randn(5, 200, generator=generator).square() ** 3
    left_out = torch.rand(5, 200, generator=generator).argsort(1)[:, :9].int()
    table = fit_table(rows, bits, 1, mass, left_out)
    mass.scatter_(1, left_out.long(), 0.0)
    best = torch.tensor([best_error(row.numpy(), of.numpy(), 1 << bits) for row, of in zip(rows, mass)])
    torch.testing.assert_close(error_of(rows, table, mass), best, rtol=1e-6, atol=0)


def test_each_entry_is_the_mean_of_what_is_near_it():
    rows = weights_of(5, 400)
    table = fit_table(rows, 3, 1000)
    codes, _ = round_to_table(rows, table)
    assert torch.equal(table, table.sort(-1).values)
    for row in range(5):
        for code in range(8):
            assert rows[row][codes[row] == code].double().mean() == pytest.approx(table[row, code].item(), rel=1e-5, abs=1e-6)


def test_more_iterations_never_lose():
    rows = weights_of(8, 2000)
    errors = [error_of(rows, fit_table(rows, 4, n), torch.ones(8, 2000)) for n in (1, 2, 4, 50, 1000)]
    assert all((after <= before * (1 + 1e-6)).all() for before, after in zip(errors, errors[1:]))
    assert (errors[-1] < errors[0]).any()


def test_what_does_not_count():
    rows = weights_of(3, 128)
    mass = torch.ones(3, 128)
    mass[:, 64:] = 0
    first = fit_table(rows[:, :64].contiguous(), 2, 50)
    assert torch.equal(fit_table(rows, 2, 50, mass), first)
    assert torch.equal(fit_table(rows, 2, 50, None, torch.arange(64, 128, dtype=torch.int32).repeat(3, 1)), first)
    mass[:, 64:] = torch.tensor([torch.nan, torch.inf, -1.0, -torch.inf]).repeat(16)
    assert torch.equal(fit_table(rows, 2, 50, mass), first)
    rows[:, 64:] = torch.tensor([torch.nan, torch.inf]).repeat(32)
    assert torch.equal(fit_table(rows, 2, 50), first)
    one = torch.zeros(3, 128)
    one[:, 7] = 1
    assert torch.equal(fit_table(rows, 2, 50, one), rows[:, 7:8].expand(3, 4))
    one[1] = 0  # a row in which nothing counts by weights
    assert torch.equal(fit_table(rows, 2, 50, one)[1], first[1])
    assert torch.equal(fit_table(torch.full((2, 9), torch.nan), 2, 50), torch.zeros(2, 4))


def test_few_different_values_are_kept_as_they_are():
    rows = torch.tensor([[1.0, 2.0, 2.0, -1.0, 0.5, 0.5, 0.5, 1.0], [0.0] * 8, [-0.0, 0.0] * 4])
    table = fit_table(rows, 2, 50)
    assert torch.equal(table.gather(1, round_to_table(rows, table)[0].long()), rows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrices(), st.integers(2, 4), st.sampled_from([1, 3, 50]), st.booleans())
def test_any_matrix_is_bit_equal_to_the_reference(x, bits, iterations, weighted):
    mass = torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x))).clamp_(min=0) if weighted else None
    assert torch.equal(fit_table(x, bits, iterations, mass), _reference(x, bits, iterations, mass, None))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"bits": 5}, ValueError, "bits is 5"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"x": torch.zeros(8)}, ValueError, "x has 1 dimensions"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"weights": torch.zeros(2, 7)}, ValueError, r"weights are torch.float32 \[2, 7\], expected torch.float32 \[2, 8\]"),
        ({"left_out": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "left_out is torch.int64"),
        ({"left_out": torch.full((2, 1), 8, dtype=torch.int32)}, ValueError, "columns from 8 to 8, expected 0 to 7"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        fit_table(**({"x": torch.zeros(2, 8), "bits": 2, "iterations": 50} | change))
