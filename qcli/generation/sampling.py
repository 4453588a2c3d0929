"""The user's options for a text: its length, and how its tokens are drawn."""

from collections.abc import Callable
from dataclasses import dataclass

from qcli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """The user's options. None means that the model's generation_config decides. temperature 0 is greedy."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self):
        _check("max-new-tokens", self.max_new_tokens, lambda v: v >= 1, "1 or more")
        _check("temperature", self.temperature, lambda v: 0 <= v < float("inf"), "0 (greedy) or more")
        _check("top-p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _check("top-k", self.top_k, lambda v: v >= 1, "1 or more")
        _check("seed", self.seed, lambda v: -(2**63) <= v < 2**64, "a whole number of at most 64 bits")

    def options(self) -> dict[str, object]:
        """Keyword arguments of transformers' generate."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        options = {name: value for name, value in given.items() if value is not None}
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return options | {"do_sample": True} if options else {}


def _check(name: str, value: float | None, good: Callable[[float], bool], expected: str) -> None:
    if value is not None and not good(value):
        raise UsageError(f"--{name} is {value}, expected {expected}")
