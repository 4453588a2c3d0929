"""The figures that sum up many tokens, with their standard errors.

Errors are those of a mean over independent tokens, s / sqrt(n) with s the sample's standard deviation, carried through exp
and differences by the delta method. Tokens of one text are not quite independent, so they are rather too small. Where two
models read the same text the errors of differences are paired: of the mean of each token's difference, most of what makes
one token harder than another being common to both.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Uncertain:
    """A value and its standard error, which is NaN for a single token."""

    value: float
    error: float


def mean(values: np.ndarray) -> Uncertain:
    """The mean of values [tokens]."""
    return Uncertain(float(values.mean()), _spread(values))


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats a token; `perplexity` exp(loss); `bits_per_byte` of the scored text in UTF-8, which models with different
    tokenizers share."""

    tokens: int
    bytes: int
    loss: Uncertain
    perplexity: Uncertain
    bits_per_byte: Uncertain


def perplexity(loss: np.ndarray, scored_bytes: int) -> Perplexity:
    """Of losses [tokens] in nats, of tokens that stand for `scored_bytes` bytes."""
    average, count = mean(loss), len(loss)
    value = float(np.exp(average.value))
    bits = count / (scored_bytes * math.log(2))
    return Perplexity(
        tokens=count,
        bytes=scored_bytes,
        loss=average,
        perplexity=Uncertain(value, value * average.error),
        bits_per_byte=Uncertain(average.value * bits, average.error * bits),
    )


@dataclass(frozen=True)
class Divergence:
    """KL(base || model) over tokens, in nats: mean, percentiles (linear between tokens), maximum."""

    mean: Uncertain
    median: float
    percentile_90: float
    percentile_95: float
    percentile_99: float
    percentile_99_9: float
    maximum: float


@dataclass(frozen=True)
class Comparison:
    """A model against a base on the same tokens. Differences are model less base; `probability` is that of the token that came.

    `same_top` is the share of tokens where both hold the same for the likeliest, with its binomial error.
    """

    divergence: Divergence
    same_top: Uncertain
    loss_change: Uncertain
    perplexity_change: Uncertain
    perplexity_ratio: Uncertain
    probability_change: Uncertain
    probability_rms_change: Uncertain


def comparison(base_loss: np.ndarray, loss: np.ndarray, kl: np.ndarray, agrees: np.ndarray) -> Comparison:
    """Of losses [tokens] of base and model in nats, their divergence and agreement on each token."""
    base, other = float(np.exp(base_loss.mean())), float(np.exp(loss.mean()))
    change, share = mean(loss - base_loss), float(agrees.mean())
    ratio = float(np.exp(change.value))
    probability = np.exp(-loss) - np.exp(-base_loss)
    square = mean(probability**2)
    rms = math.sqrt(square.value)
    return Comparison(
        divergence=Divergence(mean(kl), *map(float, np.percentile(kl, (50, 90, 95, 99, 99.9))), float(kl.max())),
        same_top=Uncertain(share, math.sqrt(share * (1 - share) / len(agrees))),
        loss_change=change,
        perplexity_change=Uncertain(other - base, _spread(other * loss - base * base_loss)),
        perplexity_ratio=Uncertain(ratio, ratio * change.error),
        probability_change=mean(probability),
        probability_rms_change=Uncertain(rms, square.error / (2 * rms) if rms else 0.0),
    )
