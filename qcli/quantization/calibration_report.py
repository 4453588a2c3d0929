"""What a calibration read, what it gained, and what the result costs on texts that it has not seen. No torch."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Checked:
    """What held-out windows say: perplexities, and KL divergences from the source in nats a token, of the result and of the same
    schemes without texts, with standard errors. `change_error` is that of their difference, paired token by token."""

    tokens: int
    source_perplexity: float
    perplexity: float
    kl: float
    kl_error: float
    plain_kl: float
    plain_kl_error: float
    change_error: float

    @property
    def is_worse(self) -> bool:
        """Whether the texts made it worse than rounding without them, by more than two standard errors."""
        return self.kl - self.plain_kl > 2 * self.change_error


@dataclass
class KindError:
    """Errors of the outputs of all modules of a kind: ||E x|| / ||W x|| over the calibration tokens, with and without the texts."""

    name: str
    modules: int
    relative_error: float
    plain_relative_error: float


@dataclass
class CalibrationReport:
    """What a calibration read and what it gained. `kinds` and `seconds` are of the modules that this run rounded."""

    text: str
    tokens: int
    sequence_length: int
    held_out: int
    modules: int
    kinds: list[KindError] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checked: Checked | None = None

    def summary(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"seconds": {name: round(value, 3) for name, value in self.seconds.items()}}
