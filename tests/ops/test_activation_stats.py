import numpy as np
import pytest
import torch

from qcli.ops.activation_stats import FIELDS, activation_stats, cases


def oracle(x, threshold):
    rows = x.double().numpy().reshape(-1, x.shape[-1])
    lowest = rows.min(0, initial=np.inf)
    highest = rows.max(0, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        count = (np.abs(rows) >= threshold).sum(0)
        return np.stack([lowest, highest, rows.sum(0), (rows**2).sum(0), (rows**4).sum(0), count])


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases(name, arguments):
    stats = activation_stats(**arguments)
    assert stats.shape == (len(FIELDS), arguments["x"].shape[-1]) and stats.dtype == torch.float64
    np.testing.assert_allclose(stats.numpy(), oracle(**arguments), rtol=1e-12, atol=1e-12)


def test_batches_merge_to_the_whole():
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([activation_stats(part, 2.0) for part in x.split(130)])
    merged = torch.cat((parts[:, :1].amin(0), parts[:, 1:2].amax(0), parts[:, 2:].sum(0)))
    torch.testing.assert_close(merged, activation_stats(x, 2.0), rtol=1e-12, atol=1e-12)
