"""Logits, a few tokens at a time. All of them, tokens x vocabulary, would take more memory than a block.

The model runs up to its head. Then its own forward is called again for a chunk of tokens. This time its body (the modules that hold
the blocks) does not run: it returns the chunk of what it returned before. So the model's own code does whatever it does to logits,
such as soft caps and scales. Calling the head's module alone would leave these out, and each model class has its own.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qcli.errors import CheckpointError, UsageError
from qcli.streaming.batches import Batch
from qcli.streaming.run import current_call
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

_REPLACING = threading.Lock()


class _Reached(Exception):
    """A call has reached the head."""


class Head:
    """The head of a model. `below(batch)` runs what is below it, inside a Call; `logits` runs the rest."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton, self.model = skeleton, skeleton.model
        module = self.model.get_output_embeddings()
        units = {id(unit.module): unit for unit in skeleton.units}
        if module is None or id(module) not in units:
            raise UsageError(
                f"{skeleton.source.label}: {type(self.model).__name__} has no head that predicts tokens",
                "Give a causal language model.",
            )
        if not skeleton.blocks:
            raise CheckpointError(
                f"{skeleton.source.label}: {type(self.model).__name__} has no layers by its config.json, expected at least one",
                "Mend the number of layers there.",
            )
        self.unit: Unit = units[id(module)]
        self._containers = containers(self.model, [unit.module for unit in skeleton.blocks])
        self._body: nn.Module | None = None

    def below(self, batch: Batch) -> Callable[[], Any]:
        """A function for Call.run. It returns the output of what is below the head for `batch`."""

        def run():
            try:
                self.model(**batch.inputs(self.skeleton.device), use_cache=False)
            except _Reached:
                return current_call().output
            raise UsageError(f"{self.skeleton.source.label}: its head was not called in a forward pass")

        return run

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """While this lasts, calls end where they reach the head."""

        def left(module, args, output):
            if (call := current_call()) is not None:
                call.output, self._body = output, module

        def reached(module, args):
            if current_call() is not None:
                raise _Reached

        handles = [container.register_forward_hook(left) for container in self._containers]
        handles.append(self.unit.module.register_forward_pre_hook(reached))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, places: Sequence[tuple[Any, int, int, int]]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the `places`, one after another. A place (output, row, first, last) is positions `first`
        to `last` of sequence `row` in the output of a call.

        The head's unit must be loaded.
        """
        chunk = torch.cat([hidden_states(output)[row : row + 1, first:last] for output, row, first, last in places], 1)
        with torch.inference_mode():
            return self.logits_of(places[0][0], chunk)

    def logits_of(self, output: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of hidden states [1, tokens, channels], in the place of those of `output`, which is what a
        call gave. Several threads may ask at a time. Autograd records it where it is on.

        The head's unit must be loaded.
        """
        return head_alone(self.model, self._body, output, hidden)[0]


def containers(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of `model`, without itself, that hold its blocks and return hidden states."""
    inside = {id(inner) for block in blocks for inner in block.modules()}
    holds = (m for m in model.modules() if m is not model and id(m) not in inside and not isinstance(m, nn.ModuleList))
    return [m for m in holds if any(id(c) in inside for c in m.modules())]


def head_alone(model: nn.Module, body: nn.Module, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [sequences, tokens, vocabulary] of hidden states [sequences, tokens, channels]. `body` is the module of `model` below
    its head, and `output` what it has returned before. Several threads may ask at a time."""
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with _standing_in(body, _with_hidden_states(output, hidden)):
        return model(input_ids=ids, use_cache=False).logits


class _StandIn:
    """A forward that returns what each thread has given it. `before` is what it stands in for, None where that is the class's."""

    def __init__(self, before: Callable[..., Any] | None):
        self.before, self.askers, self.here = before, 0, threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.here.output


@contextmanager
def _standing_in(body: nn.Module, output: Any) -> Iterator[None]:
    """While this lasts, `body` returns `output` in this thread, and in others what they have given it."""
    with _REPLACING:
        found = body.__dict__.get("forward")
        stands = found if isinstance(found, _StandIn) else _StandIn(found)
        body.forward = stands
        stands.askers += 1
        stands.here.output = output
    try:
        yield
    finally:
        with _REPLACING:
            stands.askers -= 1
            if not stands.askers and stands.before is None:
                del body.forward
            elif not stands.askers:
                body.forward = stands.before


def hidden_states(output: Any) -> torch.Tensor:
    """The last hidden states [sequences, tokens, channels] of what a model's body returned."""
    return output[0]


def _with_hidden_states(output: Any, hidden: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy.copy(output)
    changed.last_hidden_state = hidden
    return changed
