"""Tables of rows by k-means: against the best partition, which dynamic programming finds, and by arithmetic."""

import numpy as np
import pytest
import torch

from qcli.errors import UsageError
from qcli.methods import make
from qcli.methods._tables import nearest_codes, tables_of
from qcli.methods.simulate import simulate
from qcli.schemes import NAMED


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


@pytest.mark.parametrize("bits, bound", [(2, 1.03), (3, 1.04), (4, 1.07)])
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_are_near_the_best_there_are(weighted, bits, bound):
    rows = weights_of(12, 256)
    mass = torch.rand(12, 256, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else torch.ones(12, 256)
    table = tables_of(rows, bits, 50, mass if weighted else None)
    best = torch.tensor([best_error(rows[i].numpy(), mass[i].numpy(), 1 << bits) for i in range(12)], dtype=torch.float64)
    ratio = error_of(rows, table, mass) / best
    assert ratio.min() > 1 - 1e-6 and ratio.mean() < bound, ratio


def test_each_entry_is_the_mean_of_what_is_near_it():
    rows, table = weights_of(5, 400), None
    table = tables_of(rows, 3, 1000)
    codes = nearest_codes(rows, table).long()
    assert torch.equal(table, table.sort(-1).values)
    for row in range(5):
        for code in range(8):
            assert rows[row][codes[row] == code].double().mean() == pytest.approx(table[row, code].item(), rel=1e-5, abs=1e-6)


def test_weights_draw_entries_and_zeros_do_not_count():
    rows = weights_of(3, 128)
    mass = torch.ones(3, 128)
    mass[:, 64:] = 0
    assert torch.equal(tables_of(rows, 2, 50, mass), tables_of(rows[:, :64].contiguous(), 2, 50))
    one = torch.zeros(3, 128)
    one[:, 7] = 1
    assert (tables_of(rows, 2, 50, one) - rows[:, 7:8]).abs().min(-1).values.max() == 0
    assert tables_of(rows, 2, 50, torch.zeros(3, 128)).isfinite().all()


def test_few_different_values_are_kept_as_they_are():
    rows = torch.tensor([[1.0, 2.0, 2.0, -1.0, 0.5, 0.5, 0.5, 1.0], [0.0] * 8])
    table = tables_of(rows, 2, 50)
    assert torch.equal(table.gather(1, nearest_codes(rows, table).long()), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse, kept", [(0.005, 1), (0.02, 4), (0.5, 100)])
def test_the_largest_of_each_row_stay_as_they_are(sparse, kept, dtype):
    weight = weights_of(9, 200).to(dtype)
    weight[3] = 0
    weight[4, 10:20] = 5  # more that are alike than are kept
    method = make(NAMED["kmeans"], {"bits": 2, "sparse": sparse})
    encoder = method.encoder(9, 200, weight.device)
    codes = torch.cat([encoder.feed(weight[i : i + 3].flatten(), i * 200)["codes"] for i in (0, 3, 6)])
    parts, errors = encoder.finish()
    assert parts["sparse_columns"].shape == parts["sparse_values"].shape == (9, kept)
    assert (parts["sparse_columns"].diff() > 0).all() and parts["sparse_values"].dtype == dtype
    values = method.decode(parts | {"codes": codes}, 9, 200)
    smallest = weight.float().abs().sort(-1, descending=True).values[:, kept - 1 : kept]
    kept_whole = weight.float().abs() > smallest
    assert torch.equal(values[kept_whole], weight.float()[kept_whole])
    assert errors.squared_error == pytest.approx((values - weight.float()).double().square().sum().item(), rel=1e-4)
    assert torch.equal(simulate(method, weight).weight, values)
    plain = simulate(make(NAMED["kmeans"], {"bits": 2}), weight).weight
    assert (values - weight).norm() < (plain - weight).norm()


def test_it_loses_less_than_integers_of_rows():
    weight = weights_of(64, 1024).bfloat16()
    rows = make(NAMED["rtn"], {"group_size": -1, "search": "mse"})
    error = [(simulate(method, weight).weight - weight).norm() for method in (make(NAMED["kmeans"]), rows)]
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize("options", [{"bits": 5}, {"sparse": 0.6}, {"sparse": -0.1}, {"iterations": 0}, {"entries": "bfloat16"}])
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        make(NAMED["kmeans"], options)
