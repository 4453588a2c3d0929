"""What `qcli inspect-outliers --weights-only` finds, as data. `summary` gives JSON. Figures are None where they are not defined."""

from dataclasses import asdict, dataclass, field

from qcli import __version__

VERSION = {"format": "qcli-weights", "version": 1, "qcli": __version__}


@dataclass(frozen=True)
class Model:
    """`quantization` is the `quant_method` of config.json; `layers` are those of the largest stack."""

    name: str
    architecture: str
    layers: int
    hidden_size: int | None
    parameters: int
    quantization: str | None
    dtype: str


@dataclass(frozen=True)
class DimZ:
    """A dimension, and how many standard deviations it is off the mean."""

    dim: int
    z: float


@dataclass(frozen=True)
class Beyond:
    """Dimensions beyond a number of standard deviations: how many, the greatest z of all, and which ones, greatest z first."""

    beyond: int
    max_z: float | None
    dims: list[DimZ]


@dataclass(frozen=True)
class LargeWeight:
    """A single weight that stands out, in multiples of the matrix's RMS and of the next largest magnitude."""

    row: int
    column: int
    weight: float
    times_rms: float
    times_next: float | None


@dataclass(frozen=True)
class LinearFinding:
    """A linear weight [out_features, in_features]. With NaN or infinity in it, `nonfinite` counts them and the figures are None.

    `quantized` says whether `qcli quantize` quantizes it by default. `crest` is absmax / RMS. `kurtosis` is central, 3 for a
    Gaussian. `row_spread` and `block_spread` are greatest / median absmax of the rows, and of the blocks of 64. `row_crest` is the
    greatest absmax / RMS of a row. `sqnr` is in dB, by method. `columns` are the input columns whose standard deviation is more
    than 4 standard deviations above the mean of all columns, as in bitsandbytes' OutlierTracer. `largest` are single weights that
    stand out; it is None outside of the down projections of early layers, where none are looked for.
    """

    layer: int | None
    module: str
    tensor: str
    kind: str
    out_features: int
    in_features: int
    dtype: str
    quantized: bool
    nonfinite: int
    absmax: float | None
    rms: float | None
    crest: float | None
    kurtosis: float | None
    row_spread: float | None
    row_crest: float | None
    block_spread: float | None
    columns: Beyond | None
    largest: list[LargeWeight] | None
    sqnr: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class NormFinding(Beyond):
    """The gain of a norm: mean, standard deviation of the population, and the dims more than 3 of these off the mean."""

    layer: int | None
    module: str
    tensor: str
    kind: str
    channels: int
    dtype: str
    nonfinite: int
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class DimShare:
    """A dimension, and the share of the weights of its kind in which it stands out."""

    dim: int
    share: float


@dataclass(frozen=True)
class KindFinding:
    """The linear weights of one kind, over all layers. `sqnr` is that of all of them together."""

    kind: str
    weights: int
    parameters: int
    quantized: bool
    absmax: float | None
    median_crest: float | None
    median_kurtosis: float | None
    worst_row_spread: float | None
    worst_block_spread: float | None
    worst_kurtosis: float | None
    sqnr: dict[str, float | None]
    column_dims: list[DimShare]


@dataclass(frozen=True)
class NormDim:
    """A dimension beyond 3 standard deviations in `norms` of the norms of this width. It is a `candidate` for an outlier feature in
    more than half of two norms or more (BERT Busters, arXiv:2105.06990)."""

    channels: int
    dim: int
    norms: int
    of: int
    share: float
    max_z: float
    candidate: bool


@dataclass(frozen=True)
class SuperWeightCandidate(LargeWeight):
    """A weight that a forward pass would have to confirm (arXiv:2411.07191)."""

    layer: int | None = field(kw_only=True)
    module: str = field(kw_only=True)


@dataclass(frozen=True)
class Size:
    """Bytes of the whole model: as stored, and as each method would write it."""

    method: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class WeightInspection:
    """What weights and headers show. `modules_decided_by` says how linear modules were found. It is None for a quantized model,
    where only the norms are inspected."""

    model: Model
    modules_decided_by: str | None
    linears: list[LinearFinding]
    kinds: list[KindFinding]
    norms: list[NormFinding]
    norm_dims: list[NormDim]
    super_weights: list[SuperWeightCandidate]
    sizes: list[Size]
    notes: list[str]

    def summary(self) -> dict[str, object]:
        """For JSON, without NaN or infinity."""
        return VERSION | asdict(self)
