"""What `qcli inspect-outliers` finds, as data. `summary` gives JSON, which the page and the figure read.

Figures are None where they are not defined. Shares are fractions. `layer` counts the blocks that text passes.
"""

from dataclasses import asdict, dataclass, field

from qcli import __version__
from qcli.outliers.features import Feature
from qcli.outliers.paper import Row
from qcli.outliers.recommend import Recommendation
from qcli.outliers.spikes import SuperWeight

VERSION = {"format": "qcli-outliers", "version": 1, "qcli": __version__}


@dataclass(frozen=True)
class Model:
    """`quantization` names the stored scheme, or the format where there are several; None for an unquantized model."""

    name: str
    architecture: str
    layers: int
    hidden_size: int
    parameters: int | None
    quantization: str | None
    dtype: str


@dataclass(frozen=True)
class Text:
    """What was read. `tokens` are those that were measured, without the `bos_tokens` at the beginning of sequences."""

    name: str
    documents: int
    sequences: int
    sequence_length: int
    tokens: int
    bos_tokens: int
    bos: bool


@dataclass(frozen=True)
class Dim:
    """A channel with outliers. Moments are of all its values, `quartiles` of its outliers."""

    dim: int
    count: int
    share: float | None
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    absmax: float | None
    kurtosis: float | None
    quartiles: list[float] | None
    one_sided: bool


@dataclass(frozen=True)
class TokenAbsmax:
    """The largest magnitude of each token: over all tokens its median, 99th percentile and maximum."""

    median: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Values [rows, channels]. `crest` is absmax / RMS. The ratios are greatest over median absmax, of channels and of tokens."""

    channels: int
    rows: int
    absmax: float | None
    rms: float | None
    crest: float | None
    kurtosis: float | None
    channel_ratio: float | None
    token_ratio: float | None
    token_absmax: TokenAbsmax
    outlier_columns: int
    outlier_share: float | None
    dims: list[Dim]


@dataclass(frozen=True)
class Sqnr:
    """In dB, at the outputs: of the whole output, and of what comes through channels without outliers."""

    output: float | None
    ordinary: float | None


@dataclass(frozen=True, kw_only=True)
class Site(Activations):
    """An input of linear layers. `columns_kept` is the share of columns that LLM.int8() keeps in 16 bits, `sqnr` by method."""

    kind: str
    modules: list[str]
    columns_kept: float | None
    sqnr: dict[str, Sqnr] | None


@dataclass(frozen=True, kw_only=True)
class Residual(Activations):
    """What leaves a block. `median` is that of magnitudes, `massive` counts massive activations."""

    median: float | None
    massive: int


@dataclass(frozen=True)
class Layer:
    """A block. `residual` is None where what leaves it has not the shape of a hidden state."""

    layer: int
    name: str
    sites: list[Site]
    residual: Residual | None


@dataclass(frozen=True)
class Table4:
    """This model's row of the paper's Table 4, and the paper's rows."""

    outliers: int
    one_sided: int
    layers_share: float
    positions_share: float
    positions_union: float
    quartiles: list[float] | None
    top1_with: float | None
    top1_without: float | None
    perplexity: float | None
    stage: str
    papers_rows: list[Row]


@dataclass(frozen=True)
class MassiveActivation:
    """The largest of the massive activations of one layer, dimension, position and token, which `sequences` have."""

    layer: int
    position: int
    token: str
    dim: int
    value: float
    median: float
    sequences: int


@dataclass(frozen=True)
class LayerTop1:
    """Mean largest attention probability of a layer: as it is, without the outlier features, without as many random dimensions."""

    layer: int
    top1_with: float | None
    top1_without: float | None
    top1_random: float | None


@dataclass(frozen=True)
class Attention:
    """`sink_share` of the heads give the first token much of their attention; `top1` is over all layers."""

    sink_share: float
    top1: float
    layers: list[LayerTop1]


@dataclass(frozen=True)
class FirstTokens:
    """What the tokenizer puts before each text, which no other figure counts."""

    positions: int
    absmax: float | None
    outlier_dims: list[int]


@dataclass(frozen=True)
class Ablated:
    """What zeroing `dims`, and as many `random_dims`, does. `top1` has "with", "without" and "random"; None where attention shows
    no probabilities. `perplexity` has "whole", "without" and "random", and "tokens", how many were scored."""

    dims: list[int]
    random_dims: list[int]
    top1: dict[str, float] | None
    perplexity: dict[str, float | None]


@dataclass(frozen=True)
class Heatmap:
    """`absmax` and `share` of outliers are [layers][dims], at the sites of one kind."""

    kind: str
    layers: list[int]
    dims: list[int]
    absmax: list[list[float]]
    share: list[list[float]]


@dataclass(frozen=True)
class Surface:
    """`values` [tokens][dims] of one site in the first sequence."""

    layer: int
    kind: str
    tokens: list[str]
    dims: list[int]
    values: list[list[float]]


@dataclass(frozen=True)
class Histogram:
    """All values of one dimension at one site: `counts` between `edges`, and the quartiles of its outliers."""

    dim: int
    layer: int
    kind: str
    edges: list[float]
    counts: list[int]
    quartiles: list[float] | None


@dataclass(frozen=True)
class Charts:
    """What the page draws and the tables do not hold."""

    heatmap: Heatmap | None
    surface: Surface | None
    histograms: list[Histogram]


@dataclass(frozen=True)
class Inspection:
    """Outlier features of `model` on `text`. `attention` and `ablation` are None unless asked for and found, `bos` where the
    tokenizer puts nothing before a text, `recommendation` where nothing is left to quantize."""

    model: Model
    text: Text
    threshold: float
    min_layers: float
    min_positions: float
    layers: list[Layer]
    features: list[Feature]
    table4: Table4
    massive_activations: list[MassiveActivation]
    super_weights: list[SuperWeight]
    attention: Attention | None
    bos: FirstTokens | None
    ablation: Ablated | None
    charts: Charts
    notes: list[str] = field(default_factory=list)
    recommendation: Recommendation | None = None

    def summary(self) -> dict[str, object]:
        """For JSON, without NaN or infinity."""
        return VERSION | asdict(self)
