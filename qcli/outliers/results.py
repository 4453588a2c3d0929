"""The report of a measuring pass as one plain dict, for JSON, the tables, the page and the figure. null where undefined."""

import math
from collections.abc import Sequence

import torch

from qcli import __version__
from qcli.outliers import paper
from qcli.outliers.features import Feature, hidden_sites
from qcli.outliers.measure import DIMS_KEPT, LayerMeasure, SiteMeasure
from qcli.outliers.sites import ATTENTION_INPUT
from qcli.outliers.statistics import quartiles
from qcli.streaming.corpus import Corpus

FEATURES_KEPT, HEATMAP_DIMS, SURFACE_DIMS, HISTOGRAMS = 64, 64, 256, 12
_DIGITS = 5  # significant, of what only charts show


def number(value: float | torch.Tensor | None) -> float | None:
    """A finite Python float, else None."""
    value = None if value is None else float(value)
    return value if value is not None and math.isfinite(value) else None


def describe_model(skeleton, layers: int) -> dict[str, object]:
    """The model's name and measures; `layers` are those that text passes."""
    model, source = skeleton.model, skeleton.source
    stored = source.quantization or {}
    kind = None
    if stored:
        kind = "llm-int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "bitsandbytes")
    return {
        "name": source.label.rstrip("/") if source.is_hub else source.name,
        "architecture": type(model).__name__,
        "layers": layers,
        "hidden_size": model.config.get_text_config(decoder=True).hidden_size,
        "parameters": None if kind else _parameters(model),
        "quantization": kind,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
    }


def _parameters(model) -> int:
    """How many there are; on the meta device tied ones do not look it."""
    tied = model.all_tied_weights_keys
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def describe_text(corpus: Corpus) -> dict[str, object]:
    """What was read."""
    lengths = [len(window.ids) for window in corpus.windows]
    apart = len(corpus.prefix)
    return {
        "name": corpus.name,
        "documents": corpus.documents,
        "sequences": len(lengths),
        "sequence_length": max(lengths),
        "tokens": sum(lengths) - apart * len(lengths),
        "bos_tokens": apart * len(lengths),
        "bos": corpus.bos,
    }


def describe_layer(index: int, layer: LayerMeasure) -> dict[str, object]:
    """A block's sites and what leaves it."""
    residual = None
    if layer.residual is not None:
        medians = sorted(layer.medians)
        residual = _activations(layer.residual) | {
            "median": number(medians[len(medians) // 2]) if medians else None,
            "massive": len(layer.massive),
        }
    return {"layer": index, "name": layer.name, "sites": [_site(site) for site in layer.sites], "residual": residual}


def _site(measure: SiteMeasure) -> dict[str, object]:
    damage = measure.damage and {
        name: {"output": number(d.output), "ordinary": number(d.ordinary)} for name, d in measure.damage.items()
    }
    return (
        {"kind": measure.site.kind, "modules": list(measure.site.modules)}
        | _activations(measure)
        | {"columns_kept": number(measure.columns_kept), "sqnr": damage}
    )


def _activations(measure: SiteMeasure) -> dict[str, object]:
    """What is told of the activations at a site."""
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
        "token_absmax": {"median": number(median), "p99": number(high), "max": number(greatest)},
        "outlier_columns": int((count > 0).sum()),
        "outlier_share": number(count.sum() / (stats.rows * absmax.numel())),
        "dims": [_dim(measure, dim) for dim in measure.dims[:DIMS_KEPT]],
    }


def _dim(measure: SiteMeasure, dim: int) -> dict[str, object]:
    stats, moments = measure.stats, measure.stats.channel_moments()
    values, counts = measure.sketch.of(dim)
    positive, total = int(counts[values > 0].sum()), int(counts.sum())
    return {
        "dim": dim,
        "count": int(stats["count"][dim]),
        "share": number(stats["count"][dim] / stats.rows),
        "min": number(stats["min"][dim]),
        "max": number(stats["max"][dim]),
        "mean": number(moments.mean[dim]),
        "std": number(moments.std[dim]),
        "absmax": number(stats.absmax[dim]),
        "kurtosis": number(moments.kurtosis[dim]),
        "quartiles": quartiles(values, counts),
        "one_sided": positive in (0, total),
    }


def describe_features(features: Sequence[Feature]) -> list[dict[str, object]]:
    """The most common ones."""
    return [
        {
            "dim": f.dim,
            "layers_share": f.layers_share,
            "positions_share": f.positions_share,
            "positions_union": f.positions_union,
            "absmax": f.absmax,
            "quartiles": f.quartiles,
            "one_sided": f.one_sided,
            "outlier": f.outlier,
        }
        for f in features[:FEATURES_KEPT]
    ]


def table_4(features: Sequence[Feature], perplexity: float | None) -> dict[str, object]:
    """This model's row of the paper's Table 4, and the paper's."""
    outliers = [f for f in features if f.outlier]
    top = outliers[0] if outliers else None
    return {
        "outliers": len(outliers),
        "one_sided": sum(f.one_sided for f in outliers),
        "layers_share": top.layers_share if top else 0.0,
        "positions_share": top.positions_share if top else 0.0,
        "positions_union": top.positions_union if top else 0.0,
        "quartiles": top.quartiles if top else None,
        "top1_with": None,
        "top1_without": None,
        "perplexity": perplexity,
        "stage": paper.stage(top.layers_share, top.positions_share)
        if top
        else "No outlier feature: below the smallest model of the paper's table.",
        "papers_rows": paper.TABLE_4,
    }


def charts(layers: Sequence[LayerMeasure], features: Sequence[Feature], tokens: list[str], hidden_size: int) -> dict:
    """What the page draws and the tables do not hold."""
    sites = [(i, s) for i, layer in enumerate(layers) for s in hidden_sites(layer, hidden_size)]
    shown = [(i, s) for i, s in sites if s.site.kind == ATTENTION_INPUT]
    kind = ATTENTION_INPUT
    if not shown and sites:
        kind = sites[0][1].site.kind
        shown = [(i, s) for i, s in sites if s.site.kind == kind]
    if not shown:
        return {"heatmap": None, "surface": None, "histograms": []}
    absmax = torch.stack([s.stats.absmax for _, s in shown])
    share = torch.stack([s.stats["count"] / max(s.stats.rows, 1) for _, s in shown])
    first = [f.dim for f in features if f.outlier][:HEATMAP_DIMS]
    rest = [d for d in absmax.amax(0).argsort(descending=True).tolist() if d not in first]
    dims = first + rest[: HEATMAP_DIMS - len(first)]
    return {
        "heatmap": {
            "kind": kind,
            "layers": [i for i, _ in shown],
            "dims": dims,
            "absmax": _rounded(absmax[:, dims]),
            "share": _rounded(share[:, dims]),
        },
        "surface": _surface(shown, tokens),
        "histograms": _histograms(sites, features),
    }


def _surface(shown: list[tuple[int, SiteMeasure]], tokens: list[str]) -> dict[str, object] | None:
    """Tokens x channels of the layer with the largest kurtosis; channels are thinned out, the largest of each stretch stays."""
    seen = [(i, s) for i, s in shown if s.surface is not None]
    if not seen:
        return None
    index, site = max(seen, key=lambda entry: number(entry[1].stats.pooled_moments().kurtosis) or 0.0)
    peaks = site.surface.abs().amax(0)
    stretch = -(-len(peaks) // SURFACE_DIMS)
    dims = [int(part.argmax()) + start for start, part in zip(range(0, len(peaks), stretch), peaks.split(stretch))]
    return {
        "layer": index,
        "kind": site.site.kind,
        "tokens": tokens[: len(site.surface)],
        "dims": dims,
        "values": _rounded(site.surface[:, dims]),
    }


def _histograms(sites: list[tuple[int, SiteMeasure]], features: Sequence[Feature]) -> list[dict[str, object]]:
    """One of each outlier feature, where it is most often an outlier of those sites that kept its histogram."""
    found = []
    for feature in [f for f in features if f.outlier][:HISTOGRAMS]:
        kept = [entry for entry in sites if feature.dim in entry[1].histograms]
        if not kept:
            continue
        index, site = max(kept, key=lambda entry: entry[1].stats["count"][feature.dim].item() / max(entry[1].stats.rows, 1))
        edges, counts = site.histograms.of(feature.dim)
        found.append(
            {
                "dim": feature.dim,
                "layer": index,
                "kind": site.site.kind,
                "edges": [_round(e) for e in edges],
                "counts": counts,
                "quartiles": quartiles(*site.sketch.of(feature.dim)),
            }
        )
    return found


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[_round(value) for value in row] for row in matrix.tolist()]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


VERSION = {"format": "qcli-outliers", "version": 1, "qcli": __version__}
