"""NF3: the nearest of eight entries times the scale of a group, by arithmetic."""

import pytest
import torch

from qcli import codebooks
from qcli.errors import UsageError
from qcli.methods import make
from qcli.methods.simulate import simulate
from qcli.schemes import NAMED


def values(weight, **options):
    return simulate(make(NAMED["nf3"], options), weight).weight


@pytest.mark.parametrize("size, columns", [(64, 256), (32, 100), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_weight_is_the_nearest_entry_times_the_absmax(dtype, size, columns):
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    weight[3, 5] = 40
    table = torch.from_numpy(codebooks.NF3).double()
    expected = torch.zeros(9, columns, dtype=torch.float64)
    for start in range(0, columns, size):
        group = weight[:, start : start + size].double()
        scale = group.abs().amax(1, keepdim=True).to(dtype).double()
        choices = table * scale
        nearest = (group.unsqueeze(-1) - choices.unsqueeze(1)).abs().argmin(-1)
        expected[:, start : start + size] = choices.gather(1, nearest)
    found = values(weight, group_size=size).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not found[2].any()


def test_a_search_costs_less():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3] *= 20
    error = [(values(weight, search=search) - weight).square().sum() for search in ("none", "mse")]
    assert error[1] < 0.93 * error[0]


def test_it_loses_less_than_integers_of_as_many_bits():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rtn = simulate(make(NAMED["rtn"], {"bits": 3, "group_size": 64}), weight).weight
    assert (values(weight) - weight).norm() < 0.9 * (rtn - weight).norm()


@pytest.mark.parametrize("options", [{"group_size": 48}, {"group_size": -1}, {"search": "best"}, {"bits": 3}])
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        make(NAMED["nf3"], options)
