"""What a run of `generate` made, and how long it took."""

from dataclasses import dataclass


@dataclass
class Generation:
    """The new token ids and the time they took. The prefill makes the first one."""

    token_ids: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finished: bool  # an end token or a stop string ended the text, not the limit
    capture_seconds: float | None = None  # time to capture the step, before the prefill; None if it was not captured
    step: str = "transformers"  # what ran the tokens after the first: also "lean" (lean.py) or "captured" (graph.py)
    steps: int | None = None  # after the prompt; None if each made one token
    cache_bytes: float | None = None  # read per step from the cache, on average; None if not known
    kept_tokens: int = 0  # of the prompt, which the cache held from the text before and which were not read again

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, of those that were read."""
        return (self.prompt_tokens - self.kept_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_step(self) -> float | None:
        """New tokens after the first, per step. None if there was no step."""
        count = len(self.token_ids) - 1
        return None if count < 1 else count / (self.steps or count)

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None if there was only one."""
        count = len(self.token_ids) - 1
        return count / max(self.decode_seconds, 1e-9) if count > 0 else None
