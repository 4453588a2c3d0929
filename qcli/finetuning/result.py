"""What a run has done."""

from dataclasses import asdict, dataclass


@dataclass
class Finetuned:
    """`before`, `after` are held-out losses in nats a token, of the base and of what was kept, that of step `best`; None without
    held-out rows. `losses` are (step, loss, held-out loss or None) of every step. `samples` are (prompt, continuation before,
    continuation after). `base_hash` is the SHA-256 over all tensors that training has left as they were, with adapters
    all of the base. `train` is "adapters" or "weights". `next` is the command that is to follow, if any."""

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
    train: str
    next: str | None

    def summary(self) -> dict[str, object]:
        """For JSON."""
        rounded = {"seconds": round(self.seconds, 3), "tokens_per_second": round(self.tokens_per_second, 2)}
        return asdict(self) | rounded
