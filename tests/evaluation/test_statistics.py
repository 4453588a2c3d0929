"""Means, errors and percentiles: by their definitions, and by resampling, which knows no formula."""

import math
import statistics

import numpy as np
import pytest

from qcli.evaluation.statistics import comparison, mean, perplexity


@pytest.fixture
def measured():
    """(base's losses, model's, divergence, agreement) of a few hundred tokens."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 1.2, 400)
    loss = np.maximum(base + rng.normal(0.02, 0.15, 400), 1e-3)
    return base, loss, rng.exponential(0.01, 400), rng.random(400) < 0.9


def resampled(function, *arrays, rounds=2000):
    """The standard deviation of a figure over samples drawn anew from the tokens."""
    rng, n = np.random.default_rng(1), len(arrays[0])
    return np.std([function(*(a[chosen] for a in arrays)) for chosen in rng.integers(n, size=(rounds, n))])


def test_perplexity_by_definition(measured):
    loss = measured[1]
    found, values = perplexity(loss, 1300), loss.tolist()
    assert found.tokens == 400 and found.bytes == 1300
    assert found.loss.value == pytest.approx(math.fsum(values) / 400, rel=1e-14)
    assert found.loss.error == pytest.approx(statistics.stdev(values) / 20, rel=1e-12)
    assert found.perplexity.value == pytest.approx(math.prod(math.exp(v / 400) for v in values), rel=1e-12)
    assert found.bits_per_byte.value == pytest.approx(math.fsum(values) / math.log(2) / 1300, rel=1e-14)
    assert found.bits_per_byte.error / found.bits_per_byte.value == pytest.approx(found.loss.error / found.loss.value)


def test_a_uniform_model_over_bytes_takes_eight_bits():
    found = perplexity(np.full(50, math.log(256)), 50)
    assert found.perplexity.value == pytest.approx(256) and found.bits_per_byte.value == pytest.approx(8)
    assert found.perplexity.error == pytest.approx(0, abs=1e-9)


def test_comparison_by_definition(measured):
    base, loss, kl, agrees = measured
    found, change = comparison(*measured), (loss - base).tolist()
    assert found.loss_change.value == pytest.approx(statistics.fmean(change))
    assert found.loss_change.error == pytest.approx(statistics.stdev(change) / 20)
    assert found.perplexity_ratio.value == pytest.approx(math.exp(loss.mean()) / math.exp(base.mean()))
    assert found.perplexity_change.value == pytest.approx(math.exp(loss.mean()) - math.exp(base.mean()))
    assert found.same_top.value == agrees.sum() / 400
    assert found.same_top.error == pytest.approx(statistics.pstdev(agrees.astype(float)) / 20)
    p, q = [math.exp(-v) for v in base], [math.exp(-v) for v in loss]
    assert found.probability_change.value == pytest.approx(statistics.fmean(b - a for a, b in zip(p, q)))
    assert found.probability_rms_change.value == pytest.approx(math.dist(p, q) / 20)
    hundredths = statistics.quantiles(kl.tolist(), n=100, method="inclusive")
    d = found.divergence
    assert d.mean.value == pytest.approx(statistics.fmean(kl)) and d.median == pytest.approx(statistics.median(kl))
    assert (d.percentile_90, d.percentile_95, d.percentile_99) == pytest.approx([hundredths[i] for i in (89, 94, 98)])
    assert d.percentile_99_9 == pytest.approx(statistics.quantiles(kl.tolist(), n=1000, method="inclusive")[998])
    assert d.maximum == max(kl)


def test_errors_are_what_resampling_finds(measured):
    base, loss, kl, agrees = measured
    found = comparison(*measured)
    for error, function, arrays in (
        (perplexity(loss, 1).perplexity.error, lambda a: math.exp(a.mean()), (loss,)),
        (found.loss_change.error, lambda a, b: b.mean() - a.mean(), (base, loss)),
        (found.perplexity_change.error, lambda a, b: math.exp(b.mean()) - math.exp(a.mean()), (base, loss)),
        (found.perplexity_ratio.error, lambda a, b: math.exp(b.mean() - a.mean()), (base, loss)),
        (found.same_top.error, np.mean, (agrees,)),
        (found.divergence.mean.error, np.mean, (kl,)),
        (found.probability_change.error, lambda a, b: (np.exp(-b) - np.exp(-a)).mean(), (base, loss)),
        (found.probability_rms_change.error, lambda a, b: np.sqrt(((np.exp(-b) - np.exp(-a)) ** 2).mean()), (base, loss)),
    ):
        assert error == pytest.approx(resampled(function, *arrays), rel=0.1)


def test_paired_errors_are_the_smaller(measured):
    base, loss, *_ = measured
    apart = math.hypot(perplexity(base, 1).loss.error, perplexity(loss, 1).loss.error)
    assert comparison(*measured).loss_change.error < apart / 5


def test_a_model_is_no_different_from_itself(measured):
    loss = measured[1]
    found = comparison(loss, loss, np.zeros(400), np.ones(400, dtype=bool))
    for each in (found.loss_change, found.perplexity_change, found.probability_change, found.probability_rms_change):
        assert (each.value, each.error) == (0, 0)
    assert (found.perplexity_ratio.value, found.same_top.value, found.divergence.maximum) == (1, 1, 0)


def test_one_token_has_no_error():
    assert mean(np.array([2.0])).value == 2 and math.isnan(mean(np.array([2.0])).error)
    assert math.isnan(perplexity(np.array([2.0]), 3).perplexity.error)
