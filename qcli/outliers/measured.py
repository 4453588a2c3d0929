"""What texts leave at the blocks of a model, as plain data that adds up.

A machine measures its windows at each block (qcli.outliers.measure). `merge` adds what another machine measured with other windows;
the result is the same in any order. `settle` comes when no windows are left to add: it drops what no figure needs.
"""

from dataclasses import dataclass, field

import torch

from qcli.outliers.damage import Damage
from qcli.outliers.spikes import Massive, Spike, SuperWeight
from qcli.outliers.statistics import ChannelHistograms, ChannelStats, OutlierSketch

DIMS_KEPT = 16  # dims of a site that keep their histograms: those that are outliers most often

Place = tuple[int, ...]  # of something in the text: places compare as one machine would meet them


@dataclass
class SiteMeasure:
    """What was measured at one site (qcli.outliers.sites), without padding and BOS. `bos` is of the latter, at inputs of the hidden
    state. `modules` are paths in the block, and `weightless` those of them without a weight that could be rounded. `token_absmax`
    [rows] is in no order. `surface` [tokens, channels] is of the first window. `columns_kept` has the share of columns that
    LLM.int8() would keep in 16 bits, by window."""

    key: tuple[str, int]
    place: Place
    stats: ChannelStats
    sketch: OutlierSketch
    kind: str
    modules: list[str] = field(default_factory=list)
    weightless: list[str] = field(default_factory=list)
    token_absmax: list[torch.Tensor] = field(default_factory=list)
    bos: ChannelStats | None = None
    histograms: ChannelHistograms | None = None
    surface: torch.Tensor | None = None
    damage: dict[str, Damage] | None = None
    columns_kept: dict[int, float] = field(default_factory=dict)

    @property
    def dims(self) -> list[int]:
        """Channels with outliers: those with most outliers first, then those with larger ones."""
        count, absmax = self.stats["count"].tolist(), self.stats.absmax.tolist()
        return sorted((d for d, n in enumerate(count) if n), key=lambda d: (-count[d], -absmax[d], d))

    @property
    def share_kept(self) -> float | None:
        """`columns_kept`, the mean over windows; None where none was sampled."""
        shares = [share for _, share in sorted(self.columns_kept.items())]
        return sum(shares) / len(shares) if shares else None

    def merge(self, other: "SiteMeasure") -> None:
        """Adds what other windows left at the same site."""
        self.place = min(self.place, other.place)
        self.stats.merge(other.stats)
        self.sketch.merge(other.sketch)
        for name in ("modules", "weightless"):
            mine = getattr(self, name)
            mine += [path for path in getattr(other, name) if path not in mine]
        self.token_absmax += other.token_absmax
        if self.bos is not None and other.bos is not None:
            self.bos.merge(other.bos)
        if self.histograms is not None and other.histograms is not None:
            self.histograms.merge(other.histograms)
        self.surface = other.surface if self.surface is None else self.surface
        if self.damage is None:
            self.damage = other.damage
        elif other.damage is not None:
            for name, damage in self.damage.items():
                damage.merge(other.damage[name])
        self.columns_kept |= other.columns_kept

    def settle(self) -> None:
        """Drops the histograms of all but some dims."""
        if self.histograms is not None:
            self.histograms.keep(self.dims[:DIMS_KEPT])


@dataclass
class LayerMeasure:
    """A block: its sites in the order of calls, and the residual stream that leaves it (None where it has not the shape of a hidden
    state). `medians` of |x| and `massive` activations are by window. `spikes` are the greatest outputs of the FFN's last modules,
    by path."""

    index: int
    name: str
    sites: list[SiteMeasure]
    residual: SiteMeasure | None
    medians: dict[int, float] = field(default_factory=dict)
    massive: dict[int, list[Massive]] = field(default_factory=dict)
    spikes: dict[str, Spike] = field(default_factory=dict)

    @property
    def massive_activations(self) -> list[Massive]:
        """Those of all windows, in their order."""
        return [each for _, found in sorted(self.massive.items()) for each in found]

    @property
    def super_weights(self) -> list[SuperWeight]:
        """Those of all modules."""
        return [weight for spike in self.spikes.values() for weight in spike.super_weights]

    def merge(self, other: "LayerMeasure") -> None:
        """Adds what other windows left at the same block."""
        mine = {site.key: site for site in self.sites}
        for site in other.sites:
            if site.key in mine:
                mine[site.key].merge(site)
            else:
                self.sites.append(site)
        self.sites.sort(key=lambda site: site.place)
        if self.residual is None:
            self.residual = other.residual
        elif other.residual is not None:
            self.residual.merge(other.residual)
        self.medians |= other.medians
        self.massive |= other.massive
        for path, spike in other.spikes.items():
            self.spikes[path] = min(spike, self.spikes.get(path, spike), key=lambda each: each.order)

    def settle(self) -> None:
        """Drops what no figure needs of the whole text."""
        for site in self.sites:
            site.settle()


@dataclass
class Measured:
    """All blocks that text passes, in order. `affected` int64 [hidden_size] counts the positions, of `positions`, at which a hidden
    state of any layer was an outlier, by dimension."""

    layers: list[LayerMeasure]
    affected: torch.Tensor
    positions: int

    @property
    def hidden_size(self) -> int:
        """The dimensions of the hidden state."""
        return len(self.affected)

    def merge(self, other: "Measured") -> None:
        """Adds what other windows left."""
        mine = {layer.name: layer for layer in self.layers}
        for layer in other.layers:
            if layer.name in mine:
                mine[layer.name].merge(layer)
            else:
                self.layers.append(layer)
        self.layers.sort(key=lambda layer: layer.index)
        self.affected = self.affected + other.affected
        self.positions += other.positions

    def settle(self) -> None:
        """Drops what no figure needs of the whole text."""
        for layer in self.layers:
            layer.settle()
