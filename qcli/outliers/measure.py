"""The measuring pass: every text through every block once, with statistics of the inputs of linear layers and outputs of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qcli import methods
from qcli.calibration.reported_columns import HIDDEN
from qcli.errors import NonFiniteError
from qcli.evaluation.score import Contender, score
from qcli.evaluation.tokens import TokenScores
from qcli.methods._method import Method
from qcli.outliers import spikes
from qcli.outliers.damage import METHODS, Sample, SampleOf, weight_of
from qcli.outliers.measured import LayerMeasure, Measured, Place, SiteMeasure
from qcli.outliers.sites import FFN_OUTPUT, RESIDUAL, Site, SiteFinder
from qcli.outliers.statistics import ChannelHistograms, ChannelStats, OutlierSketch, is_outlier
from qcli.progress import Advance
from qcli.schemes import NAMED, Scheme
from qcli.streaming.batches import Batch
from qcli.streaming.corpus import Window
from qcli.streaming.reading import Reading
from qcli.streaming.run import Observer, current_call
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

SURFACE_TOKENS = 30


@dataclass(frozen=True)
class Asked:
    """What is measured. Values of magnitude `threshold` and more are outliers. The first `prefix` tokens of each window (BOS) are
    counted apart."""

    threshold: float
    prefix: int
    sample: Sample


def measure(
    skeleton: Skeleton, windows: Sequence[Window], numbers: Sequence[int], asked: Asked, advance: Advance, *, whole: bool
) -> tuple[Measured, TokenScores]:
    """Windows through all blocks: what was measured, and the scores of their tokens. `numbers` are the windows' in the text. With
    `whole` they are all of it, and the measures are settled.

    Raises NonFiniteError, which names the layer.
    """
    meter = Meter(skeleton, asked, numbers, whole)
    reading = Reading(skeleton, windows, advance, observer=meter)
    _, (scores,) = score(None, [Contender(skeleton.source.label, reading)], windows)
    return meter.measured, scores


class Meter(Observer):
    """Measures the blocks that calls pass; see `measure`. `measured` is the result."""

    def __init__(self, skeleton: Skeleton, asked: Asked, numbers: Sequence[int], whole: bool):
        self.skeleton, self.threshold, self.prefix, self.sample = skeleton, asked.threshold, asked.prefix, asked.sample
        quantized = skeleton.quantizer is not None
        self.methods = {} if quantized else _methods(asked.threshold)
        self.hidden_size = skeleton.model.config.get_text_config(decoder=True).hidden_size
        self._numbers, self._whole = numbers, whole
        self._layers: list[LayerMeasure] = []
        self._union: dict[tuple[int, ...], torch.Tensor] = {}  # bool [positions, hidden_size], of each batch, by its windows
        self._finder: SiteFinder | None = None

    @property
    def measured(self) -> Measured:
        """What all calls left."""
        affected = torch.zeros(self.hidden_size, dtype=torch.long)
        for mask in self._union.values():
            affected = affected + mask.sum(0)
        return Measured(self._layers, affected, sum(len(mask) for mask in self._union.values()))

    def loaded(self, unit: Unit) -> None:
        """Starts measuring a block."""
        if unit.index is None:
            return
        self._unit = unit
        self._measures: dict[int, SiteMeasure] = {}  # by the site's id
        self._samples: dict[int, SampleOf] = {}
        self._outliers: dict[int, dict[tuple[int, ...], torch.Tensor]] = {}  # of each batch, by its windows
        self._residual: SiteMeasure | None = None
        self._medians: dict[int, float] = {}
        self._massive: dict[int, list[spikes.Massive]] = {}
        self._spikes = spikes.SpikeFinder(self._place)
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
        for site in sites:
            self._describe(self._measures[id(site)], site)
        tail = next((s for s in reversed(sites) if s.kind == FFN_OUTPUT), None)
        layer = LayerMeasure(
            unit.index,
            unit.name,
            [self._measures[id(site)] for site in sites],
            self._residual,
            self._medians,
            self._massive,
            self._spikes.spikes(len(self._layers), tail.modules if tail else {}),
        )
        if self._whole:
            layer.settle()
        self._layers.append(layer)
        self._finder = None
        self._samples, self._outliers = {}, {}

    def _describe(self, measure: SiteMeasure, site: Site) -> None:
        """Adds what is known once all calls have passed, while the weights are in memory."""
        measure.kind, measure.modules = site.kind, list(site.modules)
        measure.weightless = [path for path, module in site.modules.items() if weight_of(module) is None]
        if site.kind in HIDDEN and measure.stats.channels == self.hidden_size:
            for batch, mask in self._outliers.get(id(site), {}).items():
                before = self._union.get(batch)
                self._union[batch] = mask if before is None else before | mask
        else:
            measure.histograms = measure.surface = None
        if site.kind not in HIDDEN:
            measure.bos = None
        sample = self._samples.get(id(site))
        if sample is not None and self.methods:
            measure.damage = sample.damage(site.modules, self.methods, self.threshold, self.sample.step)
            measure.columns_kept = sample.columns_kept(self.threshold)

    def _seen(self, site: Site, module: nn.Module, x: torch.Tensor, first: bool) -> None:
        if not first:
            return
        batch: Batch = current_call().batch
        channels = x.shape[-1]
        measure = self._measures.get(id(site))
        if measure is None:
            place = (*self._place(batch), len(self._measures))
            measure = self._measures[id(site)] = self._new((site.group, site.order), place, channels)
            measure.histograms = ChannelHistograms(channels) if channels == self.hidden_size else None
        path = f"{self._unit.name}.{next(iter(site.modules))}"
        if any("*" in path for path in site.modules) or x.numel() != batch.ids.numel() * channels:
            # An expert gets a share of the tokens; their positions are not known here.
            self._count(measure, x.reshape(-1, channels), f"the input of {path}")
            return
        x = x.reshape(*batch.ids.shape, channels)
        rows = x[batch.counted(self.prefix).to(x.device)]
        self._count(measure, rows, f"the input of {path}")
        if self.prefix:
            measure.bos = measure.bos or ChannelStats(channels)
            measure.bos.add(x[:, : self.prefix].reshape(-1, channels), self.threshold)
        if measure.histograms is not None:
            measure.histograms.add(rows)
            self._outliers.setdefault(id(site), {})[batch.windows] = is_outlier(rows, self.threshold).cpu()
        for row, window in enumerate(self._windows(batch)):
            sequence = x[row, : int(batch.mask[row].sum())]
            if window == 0 and measure.histograms is not None:
                measure.surface = sequence[:SURFACE_TOKENS].float().cpu().clone()  # else it keeps the whole batch
            if window in self.sample.windows and self.methods:
                self._samples.setdefault(id(site), SampleOf(self.prefix)).add(window, sequence)

    def _left(self, module: nn.Module, args: tuple, output: object) -> None:
        """What leaves the block: the residual stream."""
        batch: Batch = current_call().batch
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, torch.Tensor) or x.shape[:2] != batch.ids.shape or x.dim() != 3:
            return
        if self._residual is None:
            self._residual = self._new(("", 0), self._place(batch), x.shape[-1], RESIDUAL)
        self._count(self._residual, x[batch.counted(self.prefix).to(x.device)], f"what leaves {self._unit.name}")
        for row, window in enumerate(self._windows(batch)):
            hidden = x[row, : int(batch.mask[row].sum())]
            self._medians[window], self._massive[window] = spikes.massive(hidden, window)

    def _new(self, key: tuple[str, int], place: Place, channels: int, kind: str = "") -> SiteMeasure:
        return SiteMeasure(key, place, ChannelStats(channels), OutlierSketch(self.threshold), kind)

    def _count(self, measure: SiteMeasure, rows: torch.Tensor, where: str) -> None:
        """Adds rows [positions, channels]. Raises NonFiniteError, which says `where` they were."""
        measure.stats.add(rows, self.threshold)
        if bad := measure.stats.nonfinite:
            raise NonFiniteError(
                f"{self.skeleton.source.label}: {where} holds NaN or infinity in {len(bad)} of {rows.shape[1]} channels, the first "
                f"is {bad[0]}",
                "Try --dtype float32; if it stays, the weights before it are damaged: see --weights-only.",
            )
        measure.sketch.add(rows)
        if len(rows):
            measure.token_absmax.append(rows.abs().amax(1).float().cpu())

    def _windows(self, batch: Batch) -> list[int]:
        """The numbers in the text of a batch's windows."""
        return [self._numbers[window] for window in batch.windows]

    def _place(self, batch: Batch) -> Place:
        """Where a batch stands among those of the whole text: the one with the longest windows comes first."""
        return -batch.ids.shape[1], self._numbers[batch.windows[0]]


def _methods(threshold: float) -> dict[str, Method]:
    """Those whose damage is measured, by name."""
    return {name: methods.make(_with_threshold(NAMED[name], threshold)) for name in METHODS}


def _with_threshold(scheme: Scheme, threshold: float) -> Scheme:
    return replace(scheme, threshold=threshold) if scheme.threshold else scheme
