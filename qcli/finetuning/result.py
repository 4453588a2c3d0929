"""What a run has done."""

from dataclasses import asdict, dataclass


@dataclass
class Finetuned:
    """`before`, `after` are held-out losses in nats a token, of the base and of the adapter that was kept, that of step `best`;
    None without held-out rows. `losses` are (step, loss, held-out loss or None) of every step. `samples` are (prompt, continuation
    before, continuation after). `base_hash` is the SHA-256 over all tensors of the base, which training has left as they were."""

    output: str
    base: str
    steps: int
    best: int
    before: float | None
    after: float | None
    losses: list[tuple[int, float, float | None]]
    samples: list[tuple[str, str, str]]
    parameters: int
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_memory: int
    base_hash: str

    def summary(self) -> dict[str, object]:
        """For JSON."""
        rounded = {"seconds": round(self.seconds, 3), "tokens_per_second": round(self.tokens_per_second, 2)}
        return asdict(self) | rounded
