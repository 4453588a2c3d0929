"""What the method `kmeans` stores. Its tables: tests/ops/test_fit_table.py."""

import pytest
import torch

from qcli.errors import UsageError
from qcli.methods import make
from qcli.methods._tables import largest_columns
from qcli.methods.simulate import simulate
from qcli.schemes import NAMED
from tests.ops.test_fit_table import weights_of


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


@pytest.mark.parametrize("count", [0, 1, 7, 50])
def test_of_columns_that_are_alike_the_first_are_the_largest(count):
    sizes = torch.randint(0, 6, (20, 50), generator=torch.Generator().manual_seed(0)).float()
    sizes[3] = 0
    expected = sizes.argsort(descending=True, stable=True)[:, :count].sort(1).values
    assert torch.equal(largest_columns(sizes, count), expected)


def test_it_loses_less_than_integers_of_rows():
    weight = weights_of(64, 1024).bfloat16()
    rows = make(NAMED["rtn"], {"group_size": -1, "search": "mse"})
    error = [(simulate(method, weight).weight - weight).norm() for method in (make(NAMED["kmeans"]), rows)]
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize("options", [{"bits": 5}, {"sparse": 0.6}, {"sparse": -0.1}, {"iterations": 0}, {"entries": "bfloat16"}])
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        make(NAMED["kmeans"], options)
