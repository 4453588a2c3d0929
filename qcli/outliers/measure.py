"""The measuring pass: every text through every block once, with statistics of the inputs of linear layers and outputs of blocks."""

from dataclasses import dataclass, field

import torch
from torch import nn

from qcli.calibration.reported_columns import HIDDEN
from qcli.errors import NonFiniteError
from qcli.methods._method import Method
from qcli.outliers import spikes
from qcli.outliers.damage import Damage, SampleOf
from qcli.outliers.sites import FFN_OUTPUT, RESIDUAL, Site, SiteFinder
from qcli.outliers.statistics import ChannelHistograms, ChannelStats, OutlierSketch, is_outlier
from qcli.streaming.batches import Batch
from qcli.streaming.run import Observer, current_call
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

DIMS_KEPT = 16  # dims of a site that keep their histograms: those that are outliers most often
SURFACE_TOKENS = 30


@dataclass
class SiteMeasure:
    """What was measured at one site, without BOS and padding. `token_absmax` [rows] is in no order."""

    site: Site
    stats: ChannelStats
    sketch: OutlierSketch
    bos: ChannelStats
    token_absmax: list[torch.Tensor] = field(default_factory=list)
    histograms: ChannelHistograms | None = None
    surface: torch.Tensor | None = None  # [tokens, channels] of the first window
    damage: dict[str, Damage] | None = None
    columns_kept: float | None = None  # share of columns that LLM.int8() would keep in 16 bits

    @property
    def dims(self) -> list[int]:
        """Channels with outliers: those with most outliers first, then those with larger ones."""
        count, absmax = self.stats["count"].tolist(), self.stats.absmax.tolist()
        return sorted((d for d, n in enumerate(count) if n), key=lambda d: (-count[d], -absmax[d], d))

    def count(self, rows: torch.Tensor, threshold: float, where: str) -> None:
        """Adds rows [positions, channels]. Raises NonFiniteError, which says `where` they were."""
        self.stats.add(rows, threshold)
        if bad := self.stats.nonfinite:
            raise NonFiniteError(
                f"{where} holds NaN or infinity in {len(bad)} of {rows.shape[1]} channels, the first is {bad[0]}",
                "Try --dtype float32; if it stays, the weights before it are damaged: see --weights-only.",
            )
        self.sketch.add(rows)
        if len(rows):
            self.token_absmax.append(rows.abs().amax(1).float().cpu())


@dataclass
class LayerMeasure:
    """A block: its sites, and the residual stream that leaves it (None where it has not the shape of a hidden state)."""

    name: str
    sites: list[SiteMeasure]
    residual: SiteMeasure | None
    medians: list[float]  # of |x|, one a sequence
    massive: list[spikes.Massive]
    super_weights: list[spikes.SuperWeight]


class Meter(Observer):
    """Measures the blocks that calls pass. The first `prefix` tokens of each window (BOS) are counted apart.

    `sample` has the windows whose outputs are simulated under each method. `layers` is the result. `union` says, for each batch, at
    which positions and in which dimensions a hidden state of any layer was an outlier: bool [positions, hidden_size].
    """

    def __init__(self, skeleton: Skeleton, threshold: float, prefix: int, sample: frozenset[int], methods: dict[str, Method]):
        self.skeleton, self.threshold, self.prefix = skeleton, threshold, prefix
        self.sample, self.methods = sample, methods
        self.layers: list[LayerMeasure] = []
        self.union: dict[tuple[int, ...], torch.Tensor] = {}
        self.hidden_size = skeleton.model.config.get_text_config(decoder=True).hidden_size
        self._finder: SiteFinder | None = None

    def loaded(self, unit: Unit) -> None:
        """Starts measuring a block."""
        if unit.index is None:
            return
        self._unit = unit
        self._measures: dict[int, SiteMeasure] = {}  # by the site's id
        self._samples: dict[int, SampleOf] = {}
        self._outliers: dict[int, dict[tuple[int, ...], torch.Tensor]] = {}  # of each batch, by its windows
        self._residual: SiteMeasure | None = None
        self._medians, self._massive = {}, {}
        self._spikes = spikes.SpikeFinder()
        self._finder = SiteFinder(unit.module, self._seen)
        self._handles = [unit.module.register_forward_hook(self._left)]
        self._handles += self._spikes.hook(unit.module)

    def passed(self, unit: Unit) -> None:
        """Sums up a block."""
        if unit.index is None:
            return
        for handle in self._handles:
            handle.remove()
        sites = self._finder.close()
        measures = [self._measures[id(site)] for site in sites]
        for measure in measures:
            self._settle(measure)
        tail = next((s for s in reversed(sites) if s.kind == FFN_OUTPUT), None)
        self.layers.append(
            LayerMeasure(
                unit.name,
                measures,
                self._residual,
                [m for _, m in sorted(self._medians.items())],
                [x for _, found in sorted(self._massive.items()) for x in found],
                self._spikes.super_weights(len(self.layers), tail.modules if tail else {}),
            )
        )
        self._finder = None
        self._samples, self._outliers = {}, {}

    def _settle(self, measure: SiteMeasure) -> None:
        site = measure.site
        if site.kind in HIDDEN and measure.stats["count"].numel() == self.hidden_size:
            for batch, mask in self._outliers.get(id(site), {}).items():
                before = self.union.get(batch)
                self.union[batch] = mask if before is None else before | mask
        else:
            measure.histograms = measure.surface = None
        if measure.histograms is not None:
            measure.histograms.keep(measure.dims[:DIMS_KEPT])
        sample = self._samples.get(id(site))
        if sample is not None and self.methods:
            measure.damage = sample.damage(site.modules, self.methods, self.threshold)
            measure.columns_kept = sample.columns_kept(self.threshold)

    def _seen(self, site: Site, module: nn.Module, x: torch.Tensor, first: bool) -> None:
        if not first:
            return
        batch: Batch = current_call().batch
        channels = x.shape[-1]
        measure = self._measures.get(id(site))
        if measure is None:
            measure = self._measures[id(site)] = self._new(site, channels)
            measure.histograms = ChannelHistograms(channels) if channels == self.hidden_size else None
        if any("*" in path for path in site.modules) or x.numel() != batch.ids.numel() * channels:
            # An expert gets a share of the tokens; their positions are not known here.
            self._count(measure, x.reshape(-1, channels))
            return
        x = x.reshape(*batch.ids.shape, channels)
        counted = batch.counted(self.prefix)
        rows = x[counted.to(x.device)]
        self._count(measure, rows)
        if self.prefix:
            measure.bos.add(x[:, : self.prefix].reshape(-1, channels), self.threshold)
        if measure.histograms is not None:
            measure.histograms.add(rows)
            self._outliers.setdefault(id(site), {})[batch.windows] = is_outlier(rows, self.threshold).cpu()
            if 0 in batch.windows:
                row = batch.windows.index(0)
                measure.surface = x[row, : min(SURFACE_TOKENS, int(batch.mask[row].sum()))].float().cpu()
        taken = [row for row, window in enumerate(batch.windows) if window in self.sample]
        if taken and self.methods:
            sample = self._samples.setdefault(id(site), SampleOf(self.prefix))
            for row in taken:
                sample.add(batch.windows[row], x[row, : int(batch.mask[row].sum())])

    def _new(self, site: Site, channels: int) -> SiteMeasure:
        return SiteMeasure(site, ChannelStats(channels), OutlierSketch(self.threshold), ChannelStats(channels))

    def _count(self, measure: SiteMeasure, rows: torch.Tensor) -> None:
        path = f"{self._unit.name}.{next(iter(measure.site.modules))}"
        measure.count(rows, self.threshold, f"{self.skeleton.source.label}: the input of {path}")

    def _left(self, module: nn.Module, args: tuple, output: object) -> None:
        """What leaves the block: the residual stream."""
        batch: Batch = current_call().batch
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, torch.Tensor) or x.shape[:2] != batch.ids.shape or x.dim() != 3:
            return
        if self._residual is None:
            self._residual = self._new(Site("", 0, kind=RESIDUAL), x.shape[-1])
        rows = x[batch.counted(self.prefix).to(x.device)]
        self._residual.count(rows, self.threshold, f"{self.skeleton.source.label}: what leaves {self._unit.name}")
        for row, window in enumerate(batch.windows):
            hidden = x[row, : int(batch.mask[row].sum())]
            self._medians[window], self._massive[window] = spikes.massive(hidden, window)
