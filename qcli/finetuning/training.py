"""A step of training: rows in, adapters changed.

Adapters are float32 and so are their gradients, whatever the model computes in. The loss of a step is the mean over the tokens that
are learnt in all of its rows, however they are divided into batches and processes. The base is frozen, and runs as `generate` runs
it, without the dropout of its own training.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qcli.errors import UsageError
from qcli.finetuning.batches import Batch, batches_of
from qcli.finetuning.encoding import Row
from qcli.finetuning.loss import Loss
from qcli.finetuning.ranks import Ranks
from qcli.finetuning.settings import Options
from qcli.runtime.heap import give_back_large


class Stopped(BaseException):
    """The user wants the run to end. Not an Exception, so that no library catches it."""


@dataclass(frozen=True)
class Step:
    """`loss` is the mean over `tokens` learnt tokens, in nats, before the step; `grad_norm` that of the gradient of that mean."""

    loss: float
    tokens: int
    grad_norm: float

    @property
    def finite(self) -> bool:
        return bool(torch.tensor([self.loss, self.grad_norm]).isfinite().all())


class Trainer:
    """Changes `parameters`, the adapters of `model` by name. `stopping()` says whether the user wants the run to end."""

    def __init__(
        self, model: nn.Module, loss: Loss, parameters: dict[str, nn.Parameter], options: Options, packs: bool, ranks: Ranks
    ):
        self.model, self.loss, self.parameters, self.packs, self.ranks = model, loss, parameters, packs, ranks
        self.options, self.rare = options, options.rare
        self.optimizer = _optimizer(list(parameters.values()), options)
        self.stopping = lambda: False
        give_back_large()
        model.eval()

    def step(self, rows: Sequence[Row], lr: float, number: int) -> Step:
        """One step on `rows`. `number` decides what dropout drops. Nothing is changed where the loss or its gradient is not finite.

        Raises Stopped, and leaves the adapters as they were."""
        count = sum(row.count for row in rows)
        torch.manual_seed((self.options.seed << 24) + number * self.ranks.count + self.ranks.rank)
        self.optimizer.zero_grad(set_to_none=True)
        self._drop(True)
        try:
            total = self._sum(self.ranks.part(rows), 1 / count)
        finally:
            self._drop(False)
        gradients = [_gradient(parameter) for parameter in self.parameters.values()]
        self.ranks.add(gradients, total)
        norm = nn.utils.get_total_norm(gradients)
        found = Step(float(total) / count, count, float(norm))
        if found.finite:
            if self.rare.grad_norm:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.rare.grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return found

    def held_out(self, rows: Sequence[Row]) -> float:
        """The mean loss of the learnt tokens of `rows`, in nats."""
        total = self._sum(self.ranks.part(rows), None)
        self.ranks.add([], total)
        return float(total) / sum(row.count for row in rows)

    def _sum(self, rows: Sequence[Row], scale: float | None) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.loss.device)
        for batch in self.batches(rows):
            # Several processes end after a step, together. A measurement is a part of its step: a run that goes on needs it.
            if scale is not None and self.ranks.count == 1 and self.stopping():
                raise Stopped
            total += self.loss(batch, scale)
        return total

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """The batches in which rows pass the model."""
        width = self.model.config.get_text_config(decoder=True).hidden_size
        return batches_of(rows, self.packs, *self.options.at_a_time(rows), width)

    def _drop(self, on: bool) -> None:
        """Turns the adapters' own dropout on or off, and no other."""
        if self.rare.dropout:
            for module in self.model.modules():
                for dropout in getattr(module, "lora_dropout", {}).values():
                    dropout.train(on)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _optimizer(parameters: list[nn.Parameter], options: Options) -> torch.optim.Optimizer:
    arguments = {"lr": options.lr, "betas": (0.9, 0.999), "weight_decay": options.rare.weight_decay}
    if options.rare.optimizer == "adamw":
        fused = all(parameter.is_cuda for parameter in parameters)
        return torch.optim.AdamW(parameters, fused=fused or None, **arguments)
    with contextlib.suppress(ImportError):
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, **arguments)
    raise UsageError("optimizer=paged-adamw-8bit needs bitsandbytes, which is not installed", "pip install bitsandbytes")
