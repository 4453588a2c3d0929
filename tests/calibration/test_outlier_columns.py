"""Columns that stay in 16 bits: against every other choice on small problems, and against planted outliers."""

from itertools import combinations

import pytest
import torch

from qcli.calibration.outlier_columns import choose
from qcli.calibration.statistics import SAMPLE, Sample, Statistics


def cost(magnitude: torch.Tensor, left_out) -> float:
    """The sum over tokens of the squared scale of what is rounded."""
    return float(magnitude.double().index_fill(1, torch.tensor(left_out), 0).amax(1).square().sum())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_near_the_best_of_all_choices(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(40, 9, generator=generator).abs() * torch.rand(9, generator=generator) * 3
        best = min(cost(x, each) for each in combinations(range(9), count))
        assert cost(x, choose(x, count).tolist()) <= 1.1 * best


def test_equally_large_columns_are_left_out_together():
    """Of which one alone would save nothing."""
    x = torch.rand(100, 64, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40]] = 50.0
    found = choose(x, 8)
    assert {3, 40} <= set(found.tolist()) and found.dtype == torch.int32 and (found[1:] > found[:-1]).all()


def test_a_column_that_is_large_everywhere_is_worth_more_than_one_that_is_once():
    x = torch.rand(200, 32, generator=torch.Generator().manual_seed(0))
    x[7, 5], x[:, 9] = 20.0, 4.0
    assert choose(x, 1).tolist() == [9]


@pytest.mark.parametrize("x", [torch.zeros(5, 16), torch.full((3, 16), 1e30), torch.full((1, 16), 1e-30)])
def test_there_are_always_as_many_as_asked_for(x):
    assert len(choose(x, 8).unique()) == 8


def test_a_sample_does_not_depend_on_batches():
    x = torch.randn(3 * SAMPLE + 77, 8, generator=torch.Generator().manual_seed(0)).abs()
    kept = []
    for sizes in ([len(x)], [100] * (len(x) // 100) + [len(x) % 100], [1, 2, SAMPLE, len(x) - SAMPLE - 3]):
        sample = Sample(8, torch.device("cpu"))
        for part in x.split(sizes):
            sample.add(part)
        kept.append(sample.magnitude)
    assert torch.equal(kept[0], x[::4].bfloat16())
    assert all(torch.equal(kept[0], other) for other in kept[1:])


def test_modules_that_share_statistics_share_columns():
    statistics = Statistics(32, False, torch.device("cpu"), with_sample=True)
    statistics.add(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), 0)
    assert statistics.chosen(8) is statistics.chosen(8)
