"""From what a measuring pass has gathered to the parts of an Inspection."""

import math
from collections.abc import Sequence

import torch

from qcli.calibration.reported_columns import ATTENTION_INPUT, HIDDEN
from qcli.outliers import paper
from qcli.outliers.features import Feature, hidden_sites
from qcli.outliers.inspection import (
    Charts,
    Dim,
    FirstTokens,
    Heatmap,
    Histogram,
    Layer,
    MassiveActivation,
    Model,
    Residual,
    Site,
    Sqnr,
    Surface,
    Table4,
    Text,
    TokenAbsmax,
)
from qcli.outliers.measured import DIMS_KEPT, LayerMeasure, SiteMeasure
from qcli.outliers.statistics import quartiles
from qcli.streaming.corpus import Corpus
from qcli.streaming.skeleton import Skeleton

FEATURES_KEPT, HEATMAP_DIMS, SURFACE_DIMS, HISTOGRAMS, MASSIVE_KEPT, FIRST_DIMS = 64, 64, 256, 12, 64, 64
_DIGITS = 5  # significant, of what only charts show


def number(value: float | torch.Tensor | None) -> float | None:
    """A finite Python float, else None."""
    value = None if value is None else float(value)
    return value if value is not None and math.isfinite(value) else None


def describe_model(skeleton: Skeleton, layers: int) -> Model:
    """The model's name and measures; `layers` are those that text passes."""
    model, source = skeleton.model, skeleton.source
    quantization = _quantization(skeleton)
    return Model(
        name=source.label.rstrip("/") if source.is_hub else source.name,
        architecture=type(model).__name__,
        layers=layers,
        hidden_size=model.config.get_text_config(decoder=True).hidden_size,
        parameters=None if quantization else _parameters(model),
        quantization=quantization,
        dtype=str(skeleton.dtype).removeprefix("torch."),
    )


def _quantization(skeleton: Skeleton) -> str | None:
    if skeleton.quantizer is None:
        return None
    stored = skeleton.quantizer.quantization_config.modules.values()
    schemes = {each.scheme.name for each in stored}
    return schemes.pop() if len(schemes) == 1 else next((each.format for each in stored), "no module is quantized")


def _parameters(model) -> int:
    """How many there are. On the meta device tied parameters do not share memory, so they are told apart by name."""
    tied = model.all_tied_weights_keys
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def describe_text(corpus: Corpus) -> Text:
    """What was read."""
    lengths = [len(window.ids) for window in corpus.windows]
    first = len(corpus.prefix) * len(lengths)
    return Text(
        name=corpus.name,
        documents=corpus.documents,
        sequences=len(lengths),
        sequence_length=max(lengths),
        tokens=sum(lengths) - first,
        bos_tokens=first,
        bos=corpus.bos,
    )


def describe_layer(index: int, layer: LayerMeasure) -> Layer:
    """A block's sites and what leaves it."""
    residual = None
    if layer.residual is not None:
        medians = sorted(layer.medians.values())
        residual = Residual(
            **_activations(layer.residual),
            median=number(medians[len(medians) // 2]) if medians else None,
            massive=len(layer.massive_activations),
        )
    return Layer(index, layer.name, [_site(site) for site in layer.sites], residual)


def _site(measure: SiteMeasure) -> Site:
    damage = measure.damage and {name: Sqnr(number(d.output), number(d.ordinary)) for name, d in measure.damage.items()}
    return Site(
        kind=measure.kind, modules=measure.modules, **_activations(measure), columns_kept=number(measure.share_kept), sqnr=damage
    )


def _activations(measure: SiteMeasure) -> dict[str, object]:
    """The fields of Activations."""
    stats, moments = measure.stats, measure.stats.pooled_moments()
    absmax, count = stats.absmax, stats["count"]
    tokens = torch.cat(measure.token_absmax).double() if measure.token_absmax else torch.zeros(1)
    levels = torch.tensor([0.5, 0.99, 1.0], dtype=tokens.dtype)
    median, high, greatest = tokens.quantile(levels, interpolation="lower").tolist()
    return {
        "channels": absmax.numel(),
        "rows": stats.rows,
        "absmax": number(absmax.max()),
        "rms": number(moments.rms),
        "crest": number(absmax.max() / moments.rms),
        "kurtosis": number(moments.kurtosis),
        "channel_ratio": number(absmax.max() / absmax.median()),
        "token_ratio": number(greatest / median if median else None),
        "token_absmax": TokenAbsmax(number(median), number(high), number(greatest)),
        "outlier_columns": int((count > 0).sum()),
        "outlier_share": number(count.sum() / (stats.rows * absmax.numel())),
        "dims": [_dim(measure, dim) for dim in measure.dims[:DIMS_KEPT]],
    }


def _dim(measure: SiteMeasure, dim: int) -> Dim:
    stats, moments = measure.stats, measure.stats.channel_moments()
    values, counts = measure.sketch.of(dim)
    positive, total = int(counts[values > 0].sum()), int(counts.sum())
    return Dim(
        dim=dim,
        count=int(stats["count"][dim]),
        share=number(stats["count"][dim] / stats.rows),
        min=number(stats["min"][dim]),
        max=number(stats["max"][dim]),
        mean=number(moments.mean[dim]),
        std=number(moments.std[dim]),
        absmax=number(stats.absmax[dim]),
        kurtosis=number(moments.kurtosis[dim]),
        quartiles=quartiles(values, counts),
        one_sided=positive in (0, total),
    )


def table_4(features: Sequence[Feature], perplexity: float | None, top1: dict[str, float] | None) -> Table4:
    """This model's row of the paper's Table 4, and the paper's. `top1` is that of an ablation."""
    outliers = [f for f in features if f.outlier]
    top = outliers[0] if outliers else None
    return Table4(
        outliers=len(outliers),
        one_sided=sum(f.one_sided for f in outliers),
        layers_share=top.layers_share if top else 0.0,
        positions_share=top.positions_share if top else 0.0,
        positions_union=top.positions_union if top else 0.0,
        quartiles=top.quartiles if top else None,
        top1_with=top1 and top1["with"],
        top1_without=top1 and top1["without"],
        perplexity=perplexity,
        stage=paper.stage(top.layers_share, top.positions_share)
        if top
        else "No outlier feature: below the smallest model of the paper's table.",
        papers_rows=paper.TABLE_4,
    )


def massive_activations(skeleton: Skeleton, corpus: Corpus, layers: Sequence[LayerMeasure]) -> list[MassiveActivation]:
    """The largest of each layer, dimension, token, and position (that of the first token, or any other); largest first."""
    groups: dict[tuple, list] = {}
    for i, layer in enumerate(layers):
        for m in layer.massive_activations:
            token = skeleton.tokenizer.decode([corpus.windows[m.window].ids[m.position]])
            groups.setdefault((i, m.dim, m.position == 0, token), []).append(m)
    found = []
    for (layer, dim, _, token), group in groups.items():
        top = max(group, key=lambda m: abs(m.value))
        found.append(MassiveActivation(layer, top.position, token, dim, top.value, top.median, len(group)))
    return sorted(found, key=lambda m: -abs(m.value))[:MASSIVE_KEPT]


def first_tokens(corpus: Corpus, layers: Sequence[LayerMeasure]) -> FirstTokens | None:
    """What stands at the positions that no other figure counts; None where there are none."""
    stats = [s.bos for layer in layers for s in layer.sites if s.kind in HIDDEN and s.bos is not None and s.bos.rows]
    if not corpus.bos or not stats:
        return None
    absmax = [value for s in stats if (value := number(s.absmax.max())) is not None]
    dims = sorted({d for s in stats for d in s["count"].nonzero().view(-1).tolist()})
    return FirstTokens(len(corpus.windows) * len(corpus.prefix), max(absmax, default=None), dims[:FIRST_DIMS])


def charts(layers: Sequence[LayerMeasure], features: Sequence[Feature], tokens: list[str], hidden_size: int) -> Charts:
    """What the page draws and the tables do not hold."""
    sites = [(i, s) for i, layer in enumerate(layers) for s in hidden_sites(layer, hidden_size)]
    shown = [(i, s) for i, s in sites if s.kind == ATTENTION_INPUT]
    kind = ATTENTION_INPUT
    if not shown and sites:
        kind = sites[0][1].kind
        shown = [(i, s) for i, s in sites if s.kind == kind]
    if not shown:
        return Charts(None, None, [])
    absmax = torch.stack([s.stats.absmax for _, s in shown])
    share = torch.stack([s.stats["count"] / max(s.stats.rows, 1) for _, s in shown])
    first = [f.dim for f in features if f.outlier][:HEATMAP_DIMS]
    rest = [d for d in absmax.amax(0).argsort(descending=True).tolist() if d not in first]
    dims = first + rest[: HEATMAP_DIMS - len(first)]
    heatmap = Heatmap(kind, [i for i, _ in shown], dims, _rounded(absmax[:, dims]), _rounded(share[:, dims]))
    return Charts(heatmap, _surface(shown, tokens), _histograms(sites, features))


def _surface(shown: list[tuple[int, SiteMeasure]], tokens: list[str]) -> Surface | None:
    """Tokens x channels of the layer with the largest kurtosis. Of each run of channels the one with the largest value is shown."""
    seen = [(i, s) for i, s in shown if s.surface is not None]
    if not seen:
        return None
    index, site = max(seen, key=lambda entry: number(entry[1].stats.pooled_moments().kurtosis) or 0.0)
    peaks = site.surface.abs().amax(0)
    stretch = -(-len(peaks) // SURFACE_DIMS)
    dims = [int(part.argmax()) + start for start, part in zip(range(0, len(peaks), stretch), peaks.split(stretch))]
    return Surface(index, site.kind, tokens[: len(site.surface)], dims, _rounded(site.surface[:, dims]))


def _histograms(sites: list[tuple[int, SiteMeasure]], features: Sequence[Feature]) -> list[Histogram]:
    """One for each outlier feature: of the sites that kept its histogram, the one where it is most often an outlier."""
    found = []
    for feature in [f for f in features if f.outlier][:HISTOGRAMS]:
        kept = [entry for entry in sites if feature.dim in entry[1].histograms]
        if not kept:
            continue
        index, site = max(kept, key=lambda entry: entry[1].stats["count"][feature.dim].item() / max(entry[1].stats.rows, 1))
        edges, counts = site.histograms.of(feature.dim)
        found.append(
            Histogram(
                dim=feature.dim,
                layer=index,
                kind=site.kind,
                edges=[_round(e) for e in edges],
                counts=counts,
                quartiles=quartiles(*site.sketch.of(feature.dim)),
            )
        )
    return found


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[_round(value) for value in row] for row in matrix.tolist()]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
