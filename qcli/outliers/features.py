"""Which dimensions of the hidden state are outlier features, by the criteria of LLM.int8() (arXiv:2208.07339, section 4.1).

The hidden states of a layer are the inputs of its attention projections and of its FFN's first layers: the outputs of its norms.
The paper counts the input of the attention's output projection too. But its channels are those of the heads and no dimensions of
the hidden state, so it is left out here and has its own row in the tables.

A dimension is an outlier feature if values of magnitude `threshold` and more occur in at least MIN_LAYERS of the layers, and at
MIN_POSITIONS of the sequence positions. The last can be read in two ways. Here it is the share of all pairs of hidden state and
position, which is the stricter reading. The share of positions at which any layer has such a value is reported beside it.
"""

from dataclasses import dataclass

import torch

from qcli.calibration.reported_columns import HIDDEN
from qcli.outliers import paper
from qcli.outliers.measured import LayerMeasure, Measured, SiteMeasure
from qcli.outliers.statistics import merge_bins, quartiles

ONE_SIDED = 0.99  # of a dimension's outliers have one sign


@dataclass(frozen=True)
class Feature:
    """A dimension with values at or above the threshold. Shares are fractions. Quartiles are those of its outlier values. `outlier`
    says whether it meets the paper's criteria."""

    dim: int
    layers_share: float
    positions_share: float
    positions_union: float
    absmax: float
    quartiles: list[float]
    one_sided: bool
    outlier: bool


def hidden_sites(layer: LayerMeasure, hidden_size: int) -> list[SiteMeasure]:
    """The sites of a layer whose channels are the dimensions of the hidden state, one of each kind."""
    found = {}
    for site in layer.sites:
        if site.kind in HIDDEN and site.stats.channels == hidden_size:
            found.setdefault(site.kind, site)
    return list(found.values())


def find_features(measured: Measured) -> list[Feature]:
    """Every dimension with an outlier anywhere, the most common first."""
    by_layer = [sites for layer in measured.layers if (sites := hidden_sites(layer, measured.hidden_size))]
    if not by_layer:
        return []
    sites = [site for layer in by_layer for site in layer]
    counts = torch.stack([site.stats["count"] for site in sites]).sum(0)
    affected = torch.stack([torch.stack([s.stats["count"] for s in layer]).sum(0) > 0 for layer in by_layer])
    rows = sum(site.stats.rows for site in sites)
    anywhere = measured.affected.double() / max(measured.positions, 1)
    absmax = torch.stack([site.stats.absmax for site in sites]).amax(0)
    features = []
    for dim in counts.nonzero().view(-1).tolist():
        values, weights = merge_bins([site.sketch.of(dim) for site in sites])
        positive = int(weights[values > 0].sum())
        layers_share, positions_share = affected[:, dim].double().mean().item(), counts[dim].item() / rows
        features.append(
            Feature(
                dim=dim,
                layers_share=layers_share,
                positions_share=positions_share,
                positions_union=anywhere[dim].item(),
                absmax=absmax[dim].item(),
                quartiles=quartiles(values, weights),
                one_sided=_one_sided(positive, int(weights.sum())),
                outlier=layers_share >= paper.MIN_LAYERS and positions_share >= paper.MIN_POSITIONS,
            )
        )
    return sorted(features, key=lambda f: (not f.outlier, -f.positions_share, f.dim))


def _one_sided(positive: int, total: int) -> bool:
    return max(positive, total - positive) >= ONE_SIDED * total
