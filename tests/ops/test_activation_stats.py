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
        return np.stack([lowest, highest, *(np.float_power(rows, power).sum(0) for power in (1, 2, 3, 4)), count])


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases(name, arguments):
    stats = activation_stats(**arguments)
    assert stats.shape == (len(FIELDS), arguments["x"].shape[-1]) and stats.dtype == torch.float64
    np.testing.assert_allclose(stats.numpy(), oracle(**arguments), rtol=1e-12, atol=1e-12)


def test_moments_about_the_mean_follow():
    """Skewness and kurtosis of a channel far from zero, against those of the values less their mean."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).exp() * torch.tensor([1.0, 3.0, -2.0]) + 5
    _, _, *sums, _ = activation_stats(x, 6.0) / len(x)
    mean, second, third, fourth = sums
    variance = second - mean**2
    skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5
    kurtosis = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
    centred = x.double() - x.double().mean(0)
    moments = [centred.pow(power).mean(0) for power in (2, 3, 4)]
    torch.testing.assert_close(skewness, moments[1] / moments[0] ** 1.5, rtol=1e-9, atol=0)
    torch.testing.assert_close(kurtosis, moments[2] / moments[0] ** 2, rtol=1e-9, atol=0)


def test_batches_merge_to_the_whole():
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([activation_stats(part, 2.0) for part in x.split(130)])
    merged = torch.cat((parts[:, :1].amin(0), parts[:, 1:2].amax(0), parts[:, 2:].sum(0)))
    torch.testing.assert_close(merged, activation_stats(x, 2.0), rtol=1e-12, atol=1e-12)
