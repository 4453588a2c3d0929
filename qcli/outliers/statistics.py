"""Statistics of activations that are gathered batch by batch. The result does not depend on the order of the batches.

Each class has a `merge`, which adds what another one was given. So texts may be divided over machines.
"""

import math
from dataclasses import dataclass

import torch

from qcli.ops.activation_stats import FIELDS, activation_stats
from qcli.outliers.sums import WideSum

_EXTREMES, _SUMS = FIELDS[:2], FIELDS[2:]
SKETCH_ERROR = 0.005  # of a quantile of the sketch, relative
HISTOGRAM_BINS = 129
_LEAST_VARIANCE = 1e-5  # of the mean square; below it float64 power sums are too coarse for a kurtosis
_SKETCH_PIECE = 1 << 20  # elements at a time: each outlier takes some forty bytes meanwhile
_STEPS = 8  # bins of the histogram per unit of asinh(x)


class ChannelStats:
    """Moments, extremes and counts of each channel, float64, exact but for the rounding of float64 sums within a batch."""

    def __init__(self, channels: int):
        self.rows, self.channels = 0, channels
        self._least = torch.full((channels,), torch.inf, dtype=torch.float64)
        self._greatest = torch.full((channels,), -torch.inf, dtype=torch.float64)
        self._sums = WideSum(len(_SUMS), channels)

    def add(self, x: torch.Tensor, threshold: float) -> None:
        """Adds x [rows, channels]. Elements of magnitude `threshold` and more are outliers."""
        least, greatest, *sums = activation_stats(x, threshold).cpu()
        self._extend(least, greatest, len(x))
        self._sums.add(torch.stack(sums))

    def merge(self, other: "ChannelStats") -> None:
        """Adds the rows of another."""
        self._extend(other._least, other._greatest, other.rows)
        self._sums.merge(other._sums)

    def _extend(self, least: torch.Tensor, greatest: torch.Tensor, rows: int) -> None:
        self._least, self._greatest = torch.minimum(self._least, least), torch.maximum(self._greatest, greatest)
        self.rows += rows

    def __getitem__(self, field: str) -> torch.Tensor:
        """[channels] of one of activation_stats.FIELDS."""
        if field in _EXTREMES:
            return self._least if field == "min" else self._greatest
        return self._sums.value[_SUMS.index(field)]

    @property
    def nonfinite(self) -> list[int]:
        """Channels that hold NaN or infinity."""
        return (~self["sum_fourths"].isfinite()).nonzero().view(-1).tolist()

    @property
    def absmax(self) -> torch.Tensor:
        """Greatest magnitude [channels]; 0 where no row was added."""
        return torch.maximum(self["max"], -self["min"]).clamp_min(0)

    def channel_moments(self) -> "Moments":
        """Moments of each channel [channels]."""
        sums = (self[f] for f in ("sum", "sum_squares", "sum_cubes", "sum_fourths"))
        return Moments(torch.tensor(float(self.rows), dtype=torch.float64), *sums)

    def pooled_moments(self) -> "Moments":
        """Moments over all values of all channels, each a scalar."""
        sums = (self[f].sum() for f in ("sum", "sum_squares", "sum_cubes", "sum_fourths"))
        return Moments(torch.tensor(float(self.rows * self.channels), dtype=torch.float64), *sums)


@dataclass
class Moments:
    """A count and four power sums, float64, of the same shape."""

    count: torch.Tensor
    sum: torch.Tensor
    sum_squares: torch.Tensor
    sum_cubes: torch.Tensor
    sum_fourths: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Sum / count."""
        return self.sum / self.count

    @property
    def rms(self) -> torch.Tensor:
        """Root of the mean square."""
        return (self.sum_squares / self.count).sqrt()

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation of the population."""
        return (self.sum_squares / self.count - self.mean.square()).clamp_min(0).sqrt()

    @property
    def kurtosis(self) -> torch.Tensor:
        """Fourth central moment over the squared variance: 3 for a Gaussian. NaN where values vary by less than a 300th of their
        mean: from there on the rounding of the sums spoils it."""
        m, n = self.mean, self.count
        variance = self.sum_squares / n - m.square()
        fourth = self.sum_fourths / n - 4 * m * self.sum_cubes / n + 6 * m.square() * self.sum_squares / n - 3 * m**4
        flat = variance <= _LEAST_VARIANCE * self.sum_squares / n
        return torch.where(flat, torch.nan, fourth / variance.square())


def is_outlier(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where |x| >= threshold, bool of x's shape. Compared in float32, as activation_stats does: 16 bits would round the
    threshold."""
    return x.float().abs() >= threshold


class OutlierSketch:
    """The distribution of each channel's values of magnitude `threshold` and more, in bins of a constant ratio.

    A quantile is off by at most SKETCH_ERROR of its value (DDSketch, arXiv:1908.10693). Bins of channels without such values
    take no memory.
    """

    _CHANNEL = 1 << 20  # keys: channel * _CHANNEL + signed bin + half of it

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._ratio = math.log((1 + SKETCH_ERROR) / (1 - SKETCH_ERROR))
        self._keys = torch.zeros(0, dtype=torch.long)
        self._counts = torch.zeros(0, dtype=torch.long)

    def add(self, x: torch.Tensor) -> None:
        """Adds the outliers of x [rows, channels]."""
        for part in x.split(max(_SKETCH_PIECE // max(x.shape[-1], 1), 1)):
            self._add(part)

    def _add(self, x: torch.Tensor) -> None:
        where = is_outlier(x, self.threshold).nonzero()
        values = x[where[:, 0], where[:, 1]].double()
        bins = 1 + ((values.abs() / self.threshold).log() / self._ratio).floor().long()
        keys = where[:, 1] * self._CHANNEL + self._CHANNEL // 2 + bins * values.sign().long()
        self._put(*keys.cpu().unique(return_counts=True))

    def merge(self, other: "OutlierSketch") -> None:
        """Adds the outliers of another sketch of the same threshold."""
        self._put(other._keys, other._counts)

    def _put(self, new: torch.Tensor, counts: torch.Tensor) -> None:
        self._keys, place = torch.cat((self._keys, new)).unique(return_inverse=True)
        self._counts = torch.zeros(len(self._keys), dtype=torch.long).index_add_(0, place, torch.cat((self._counts, counts)))

    def of(self, channel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(values ascending, how many of each) of a channel's bins, float64 and int64."""
        mine = self._keys // self._CHANNEL == channel
        bins = self._keys[mine] % self._CHANNEL - self._CHANNEL // 2
        # The point of a bin [a, b] with the same relative distance to both ends: 2ab / (a + b).
        low = self.threshold * ((bins.abs().double() - 1) * self._ratio).exp()
        return bins.sign() * low * (1 + SKETCH_ERROR), self._counts[mine]

    def channels(self) -> list[int]:
        """The channels that have outliers."""
        return (self._keys // self._CHANNEL).unique().tolist()


def quartiles(values: torch.Tensor, counts: torch.Tensor) -> list[float] | None:
    """The values with a quarter, a half and three quarters of the counts below them; None without counts."""
    total = int(counts.sum())
    if not total:
        return None
    ranks = torch.tensor([int(q * (total - 1)) for q in (0.25, 0.5, 0.75)])
    return values[torch.searchsorted(counts.cumsum(0), ranks, right=True)].tolist()


def merge_bins(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The bins of several sketches of one channel as one: (values ascending, counts)."""
    values, place = torch.cat([v for v, _ in parts]).unique(return_inverse=True)
    counts = torch.cat([c for _, c in parts])
    return values, torch.zeros(len(values), dtype=torch.long).index_add_(0, place, counts)


class ChannelHistograms:
    """A coarse histogram of each channel, for the eye: bins of equal width in asinh(x)."""

    def __init__(self, channels: int):
        self._counts = torch.zeros(channels * HISTOGRAM_BINS, dtype=torch.int32)
        self._kept: dict[int, torch.Tensor] | None = None

    def add(self, x: torch.Tensor) -> None:
        """Adds x [rows, channels]."""
        half, channels = HISTOGRAM_BINS // 2, x.shape[1]
        bins = (x.float().asinh() * _STEPS).round_().clamp_(-half, half).int() + half
        bins += torch.arange(channels, dtype=torch.int32, device=x.device) * HISTOGRAM_BINS
        self._counts += torch.bincount(bins.view(-1), minlength=channels * HISTOGRAM_BINS).cpu().int()

    def merge(self, other: "ChannelHistograms") -> None:
        """Adds the counts of another, of the same channels. Neither has dropped any."""
        self._counts = self._counts + other._counts

    def keep(self, channels: list[int]) -> None:
        """Drops all channels but these, once everything was added."""
        counts = self._counts.view(-1, HISTOGRAM_BINS)
        self._kept = {channel: counts[channel].clone() for channel in channels}
        del self._counts

    def __contains__(self, channel: int) -> bool:
        """Whether a channel was kept."""
        return channel in self._kept

    def of(self, channel: int) -> tuple[list[float], list[int]]:
        """(edges, counts) of a channel that was kept, without the empty bins at both ends."""
        counts = self._kept[channel]
        used = counts.nonzero().view(-1)
        if not len(used):
            return [], []
        first, last = int(used[0]), int(used[-1])
        edges = [math.sinh((i - HISTOGRAM_BINS // 2 - 0.5) / _STEPS) for i in range(first, last + 2)]
        return edges, counts[first : last + 1].tolist()
