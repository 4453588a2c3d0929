"""The loss of a model in memory on the tokens that are learnt, without keeping logits.

The model runs up to its head. The head then runs on the tokens that are learnt alone, a few at a time, and each time its gradient
flows back to its inputs at once. So tokens x vocabulary never stands in memory, which would be the peak of every modern model.
Losses are float32, and their sum float64.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qcli.errors import UsageError
from qcli.finetuning.batches import Batch
from qcli.memory.costs.training import LOGITS_AT_A_TIME
from qcli.streaming.head import containers, head_alone, hidden_states
from qcli.streaming.units import find_units


class _Reached(Exception):
    """The forward pass has reached the head."""


class Loss:
    """Of `model`, a causal language model of transformers, on `device`. With `checkpointing` a block keeps its input alone and runs
    again for its gradient. `label` names the model in messages."""

    def __init__(self, model: nn.Module, device: torch.device, label: str, checkpointing: bool):
        self.model, self.device, self.label = model, device, label
        self.head = model.get_output_embeddings()
        blocks = [unit.module for unit in find_units(model) if unit.index is not None]
        if self.head is None or not blocks:
            raise UsageError(f"{label}: {type(model).__name__} has no head that predicts tokens", "Give a causal language model.")
        self._containers = containers(model, blocks)
        if checkpointing:
            for block in blocks:
                block.forward = _checkpointed(block.forward)

    def __call__(self, batch: Batch, scale: float | None = None) -> torch.Tensor:
        """The sum of the losses of the learnt tokens, in nats, float64 [], on the device. With `scale` the gradient of scale times
        that sum is added to what is trained; without, nothing is differentiated."""
        with torch.set_grad_enabled(scale is not None):
            body, output = self.below(batch)
            learnt = batch.trained[:, 1:].to(self.device)
            hidden = hidden_states(output)[:, :-1][learnt]
            targets = batch.ids[:, 1:].to(self.device)[learnt]
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            inputs = hidden.detach()
            gradients = []
            for some, ids in zip(inputs.split(self._rows()), targets.split(self._rows())):
                some = some.requires_grad_(scale is not None)
                logits = head_alone(self.model, body, output, some.unsqueeze(0))[0]
                loss = cross_entropy(logits.float(), ids, reduction="sum")
                del logits
                if scale is not None:
                    (loss * scale).backward()
                    gradients.append(some.grad)
                total += loss.detach().double()
            if scale is not None:
                hidden.backward(torch.cat(gradients))
        return total

    def _rows(self) -> int:
        vocabulary = getattr(self.head, "out_features", None) or self.head.weight.shape[0]
        return max(LOGITS_AT_A_TIME // vocabulary, 16)

    def below(self, batch: Batch) -> tuple[nn.Module, Any]:
        """(the module below the head, what it returns for `batch`)."""
        left: list[tuple[nn.Module, Any]] = []

        def reached(module, args):
            raise _Reached

        handles = [c.register_forward_hook(lambda module, args, output: left.append((module, output))) for c in self._containers]
        handles.append(self.head.register_forward_pre_hook(reached))
        try:
            self.model(**batch.inputs(self.device), use_cache=False)
        except _Reached:
            return left[-1]
        finally:
            for handle in handles:
                handle.remove()
        raise UsageError(f"{self.label}: its head was not called in a forward pass")


def _checkpointed(forward):
    def run(*args, **kwargs):
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return run


def packs_rows(loss: Loss) -> bool:
    """Whether the model keeps rows apart that lie one behind the other in a sequence and differ in their positions alone. A row
    that sees another has a gradient with respect to the other's embeddings; a row that does not, none at all."""
    rows, tokens = 2, 8
    ids = torch.arange(rows * tokens).view(1, -1) % 64
    positions = torch.arange(tokens).repeat(rows).view(1, -1)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), positions=positions)
    seen: list[torch.Tensor] = []

    def keep(module, args, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = loss.model.get_input_embeddings().register_forward_hook(keep)
    try:
        _, output = loss.below(batch)
        last = hidden_states(output)[0, tokens:].float()
        (gradient,) = torch.autograd.grad((last * torch.sin(torch.arange(last.numel()).view(last.shape).to(last))).sum(), seen[0])
        alone = Batch(ids[:, tokens:], batch.trained[:, tokens:])
        seen.clear()
        _, output = loss.below(alone)
    except (RuntimeError, TypeError, ValueError):  # a model that takes no positions
        return False
    finally:
        handle.remove()
    same = (hidden_states(output)[0].float() - last).norm() <= 0.1 * last.norm()
    return bool(same and not gradient[0, :tokens].any() and gradient[0, tokens:].any())
