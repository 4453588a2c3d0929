"""What `qcli evaluate` finds: a row for each model or method, and the protocol of the measurement."""

import math
from dataclasses import asdict, dataclass, field

from qcli.evaluation.speed import Speed
from qcli.evaluation.statistics import Comparison, Perplexity
from qcli.streaming.corpus import Corpus


@dataclass(frozen=True)
class Protocol:
    """How text was read. Of `tokens` tokens `scored` were scored; they stand for `scored_bytes` bytes of UTF-8. `dtype` is that of
    the computation, `device` a name of torch."""

    text: str
    documents: int
    windows: int
    sequence_length: int
    stride: int
    bos: bool
    tokens: int
    scored: int
    scored_bytes: int
    dtype: str
    device: str

    @classmethod
    def of(cls, corpus: Corpus, dtype: str, device: str) -> "Protocol":
        """The protocol of a corpus."""
        return cls(
            text=corpus.name,
            documents=corpus.documents,
            windows=len(corpus.windows),
            sequence_length=corpus.sequence_length,
            stride=corpus.stride,
            bos=corpus.bos,
            tokens=corpus.tokens,
            scored=corpus.scored,
            scored_bytes=corpus.scored_bytes,
            dtype=dtype,
            device=device,
        )

    def sentences(self) -> list[str]:
        """The protocol for people."""
        overlap = self.sequence_length - self.stride
        return [
            f"{self.text}: {_count(self.documents, 'document')}, {self.tokens:,} tokens, of which {self.scored:,} are scored; "
            f"they stand for {self.scored_bytes:,} bytes",
            f"{_count(self.windows, 'window')} of up to {self.sequence_length:,} tokens, stride {self.stride:,} "
            f"({f'the first {overlap:,} of a later window are context only' if overlap else 'no overlap'}), "
            f"{'each begins with BOS' if self.bos else 'no BOS: the first token of a window is not scored'}",
            f"computed in {self.dtype} on {self.device}; ± is one standard error, tokens taken as independent, "
            "differences paired token by token",
        ]


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


@dataclass
class Row:
    """A model, or a method simulated in it.

    `bytes` are those of all weights as stored. `bits_per_weight` is that of the linear layers that `qcli quantize` quantizes. SQNR
    is in dB, None where nothing was rounded: of these layers' weights, of their activations, and of the activations in columns
    without an outlier. `against` compares with the first row.
    """

    name: str
    quality: Perplexity
    bytes: int
    bits_per_weight: float
    against: Comparison | None = None
    weight_sqnr: float | None = None
    activation_sqnr: float | None = None
    ordinary_activation_sqnr: float | None = None
    speed: Speed | None = None


@dataclass
class Evaluation:
    """What was measured of `model`. `rows` begin with the base, where there is one: that of --against, or with --methods the
    unquantized model. The rows of --methods are `simulated`."""

    model: str
    revision: str | None  # on the hub
    protocol: Protocol
    rows: list[Row]
    simulated: bool = False
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """For JSON. NaN and infinity become null."""
        return _finite(asdict(self))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
