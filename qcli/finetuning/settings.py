"""The options of a run, checked as far as they can be without the model."""

import math
import typing
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, fields

from qcli.errors import UsageError, one_of
from qcli.finetuning.rows import TOO_LONG
from qcli.methods.choosing import sorted_settings

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "paged-adamw-8bit")
CHECKPOINTING = ("auto", "true", "false")
LOSSES = ("auto", "all", "completion", "assistant")
TRAIN = ("adapters", "weights")
_MOST_RANK = 4096
_TOKENS = 1024  # that pass the model together, of shorter rows: enough for products at full speed


def _within(name: str, value: float, good: bool, expected: str) -> None:
    if not good:  # a NaN is not
        raise UsageError(f"{name} is {value:,}, expected {expected}")


@dataclass(frozen=True)
class Rare:
    """Rarer options, given as name=value. What they are by default suits most runs."""

    train: str = TRAIN[0]  # or the weights of the modules themselves, rounded to int8 in each pass
    dropout: float = 0.0  # of the adapters' inputs
    rslora: bool = False  # scale by alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732)
    warmup: float = 0.03  # share of the steps over which the learning rate rises
    schedule: str = SCHEDULES[0]  # to a tenth of the learning rate, or constant
    weight_decay: float = 0.0
    grad_norm: float = 1.0  # gradients are scaled down to that norm; 0 leaves them
    sequences_at_a_time: int = 0  # rows that pass the model together; 0: as many as have 1,024 tokens
    checkpointing: str = CHECKPOINTING[0]  # whether blocks run twice and keep less; auto: on a GPU
    loss: str = LOSSES[0]  # which tokens are learnt; auto: the text, the completion, the assistant's
    optimizer: str = OPTIMIZERS[0]  # the other is bitsandbytes'
    eval_steps: int = 0  # steps between two measurements of the held-out loss; 0: ten in a run

    def __post_init__(self) -> None:
        one_of("train", self.train, TRAIN)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("checkpointing", self.checkpointing, CHECKPOINTING)
        one_of("loss", self.loss, LOSSES)
        _within("dropout", self.dropout, 0 <= self.dropout < 1, "0 or more, below 1")
        _within("warmup", self.warmup, 0 <= self.warmup <= 1, "a share of the steps, from 0 to 1")
        _within("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _within("grad_norm", self.grad_norm, 0 <= self.grad_norm < math.inf, "0 or more")
        _within("sequences_at_a_time", self.sequences_at_a_time, self.sequences_at_a_time >= 0, "0 or more")
        _within("eval_steps", self.eval_steps, self.eval_steps >= 0, "0 or more")
        if self.train == "weights" and (self.dropout or self.rslora):
            name = "dropout" if self.dropout else "rslora"
            raise UsageError(f"{name} is for adapters, and train=weights trains none", f"Leave out {name}.")


@dataclass(frozen=True)
class Options:
    """What a run is asked to do. `epochs` and `steps` None: as the number of examples suggests."""

    rank: int = 16
    alpha: float = 32.0
    target: str = "all-linear"
    epochs: float | None = None
    steps: int | None = None
    lr: float = 2e-4
    batch: int = 16
    max_tokens: int = 2048
    too_long: str | None = None
    seed: int = 0
    rare: Rare = Rare()

    def __post_init__(self) -> None:
        _within("--rank", self.rank, 1 <= self.rank <= _MOST_RANK, f"1 to {_MOST_RANK:,}")
        _within("--alpha", self.alpha, 0 < self.alpha < math.inf, "more than 0")
        _within("--lr", self.lr, 0 < self.lr < math.inf, "more than 0")
        _within("--batch", self.batch, self.batch >= 1, "1 or more")
        _within("--max-tokens", self.max_tokens, self.max_tokens >= 2, "2 or more")
        _within("--seed", self.seed, 0 <= self.seed < 2**31, "0 to 2^31 - 1")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("--epochs and --steps were both given", "Give one of them.")
        if self.epochs is not None:
            _within("--epochs", self.epochs, 0 < self.epochs < math.inf, "more than 0")
        if self.steps is not None:
            _within("--steps", self.steps, self.steps >= 1, "1 or more")
        if self.too_long is not None:
            one_of("--too-long", self.too_long, TOO_LONG)

    def at_a_time(self, rows: Sequence[Sized]) -> tuple[int, int | None]:
        """(tokens, rows) that pass the model together at most, of those of a step. A row passes whole, however long it is."""
        longest, asked = max(map(len, rows), default=0), self.rare.sequences_at_a_time
        return (asked * longest, asked) if asked else (max(longest, _TOKENS), None)

    def learning_rate(self, step: int, steps: int) -> float:
        """Of step `step`, counted from 0, of `steps`."""
        warm = round(self.rare.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        passed = (step - warm) / max(steps - warm, 1)
        if self.rare.schedule == "cosine":
            return self.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * passed)) / 2)
        return self.lr * (1 - 0.9 * passed) if self.rare.schedule == "linear" else self.lr


def rare_options(given: Mapping[str, object]) -> Rare:
    """Of name=value settings. Raises UsageError."""
    hints = typing.get_type_hints(Rare)
    own, _ = sorted_settings("finetune", {field.name: hints[field.name] for field in fields(Rare)}, given, {})
    return Rare(**own)  # type: ignore[arg-type]
