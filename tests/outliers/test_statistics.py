"""Statistics gathered in pieces against numpy's, in float64, of the same numbers."""

import numpy as np
import pytest
import torch

from qcli.outliers.statistics import SKETCH_ERROR, ChannelHistograms, ChannelStats, OutlierSketch, merge_bins, quartiles

THRESHOLD = 6.0


@pytest.fixture(scope="module")
def x():
    """float32 [5000, 12]: Gaussian, shifted, one-sided, heavy-tailed, tiny and huge channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 12, generator=generator)
    x[:, 1] += 20
    x[:, 2] = x[:, 2].abs() * 8
    x[:, 3] = x[:, 3] ** 5
    x[:, 4] *= 1e-20
    x[:, 5] *= 1e15
    x[:, 6] = -30 + 3 * x[:, 6]
    x[:, 7] = THRESHOLD
    return x


@pytest.fixture(scope="module", params=[1, 7, 1000, 5000])
def pieces(request, x):
    return x.split(request.param) if request.param > 1 else x[:200].split(1) + (x[200:],)


def test_counts_extremes_and_moments(x, pieces):
    stats = ChannelStats(x.shape[1])
    for piece in pieces:
        stats.add(piece, THRESHOLD)
    wide = x.double().numpy()
    assert stats.rows == len(x)
    np.testing.assert_array_equal(stats["min"], wide.min(0))
    np.testing.assert_array_equal(stats["max"], wide.max(0))
    np.testing.assert_array_equal(stats.absmax, np.abs(wide).max(0))
    np.testing.assert_array_equal(stats["count"], (np.abs(wide) >= THRESHOLD).sum(0))
    moments = stats.channel_moments()
    np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(moments.rms, np.sqrt((wide**2).mean(0)), rtol=1e-6)
    varied = [c for c in range(12) if c != 7]
    np.testing.assert_allclose(moments.std[varied], wide.std(0)[varied], rtol=1e-6)
    centred = wide - wide.mean(0)
    kurtosis = (centred**4).mean(0)[varied] / (centred**2).mean(0)[varied] ** 2
    np.testing.assert_allclose(moments.kurtosis[varied], kurtosis, rtol=1e-6)
    assert torch.isnan(moments.kurtosis[7])
    pooled = stats.pooled_moments()
    centred = wide - wide.mean()
    assert pooled.kurtosis.item() == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-6)


def test_quartiles_of_the_sketch_keep_their_error(x, pieces):
    sketch = OutlierSketch(THRESHOLD)
    for piece in pieces:
        sketch.add(piece)
    for channel in range(x.shape[1]):
        column = x[:, channel].double().numpy()
        outliers = column[np.abs(column) >= THRESHOLD]
        found = quartiles(*sketch.of(channel))
        if not len(outliers):
            assert found is None
            continue
        exact = np.quantile(outliers, (0.25, 0.5, 0.75), method="lower")
        np.testing.assert_allclose(found, exact, rtol=SKETCH_ERROR * 1.0001)
        assert int(sketch.of(channel)[1].sum()) == len(outliers)


def test_sketches_merge(x):
    parts = []
    for half in x.split(2500):
        parts.append(OutlierSketch(THRESHOLD))
        parts[-1].add(half)
    whole = OutlierSketch(THRESHOLD)
    whole.add(x)
    for channel in (1, 2, 3, 6):
        values, counts = merge_bins([part.of(channel) for part in parts])
        assert torch.equal(values, whole.of(channel)[0]) and torch.equal(counts, whole.of(channel)[1])


def test_large_inputs_are_sketched_in_pieces(x, monkeypatch):
    whole, parts = OutlierSketch(THRESHOLD), OutlierSketch(THRESHOLD)
    whole.add(x)
    monkeypatch.setattr("qcli.outliers.statistics._SKETCH_PIECE", 100)
    parts.add(x)
    assert quartiles(*whole.of(3)) == quartiles(*parts.of(3))


def test_histograms_hold_every_value_between_their_edges(x, pieces):
    histograms = ChannelHistograms(x.shape[1])
    for piece in pieces:
        histograms.add(piece)
    histograms.keep([0, 1, 2])
    for channel in (0, 1, 2):
        edges, counts = histograms.of(channel)
        expected, _ = np.histogram(x[:, channel].double().numpy(), edges)
        assert np.abs(expected - np.array(counts)).sum() <= 2 and sum(counts) == len(x)  # float32 at an edge
