"""The gradient of a loss through a streamed model, block by block, from the last one to the first.

On the way forward every block is passed without a graph, and what enters it is kept. What it gives is where autograd starts
anew, so the code between blocks, which stays transformers' own, makes a small graph from the outputs of some blocks to the
inputs of the next. On the way back the head gives the gradient of the loss, and then each block is read once more, computed once
more with a graph, and passes on to its inputs what arrives at its outputs. So memory holds one block, and of each window the
hidden states at every block. All weights are read twice.

The loss is the sum, over the tokens that windows score, of the negative logarithm of their probability, in nats. A batch of windows
is a call, computed by one thread from end to end: nothing depends on the number of threads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from qcli.calibration.gather import Crew
from qcli.calibration.waiting import WaitingStates
from qcli.errors import NonFiniteError
from qcli.streaming.batches import make_batches
from qcli.streaming.corpus import Window
from qcli.streaming.head import Head, hidden_states
from qcli.streaming.run import Call, Observer, Pass, run_calls
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

LOGIT_BYTES = 64 << 20  # of a chunk of logits in float32; its gradient and two copies stand beside it


@dataclass
class Entered:
    """A block that batches entered together: by batch, its pass, and what it gave, from where autograd starts anew."""

    unit: Unit
    passes: list[Pass | None]
    outputs: list[Any]


class Backward:
    """Windows that have passed a model forward. `entered` are the blocks, in the order in which they were entered, and `loss` has
    the loss of all of them, in nats, once `through_head` was called.

    With `states`, hidden states wait there for the gradients. Raises NonFiniteError where the loss is NaN or infinite.
    """

    def __init__(self, skeleton: Skeleton, windows: Sequence[Window], crew: Crew, states: WaitingStates | None = None):
        self.skeleton, self.crew, self.head, self._states = skeleton, crew, Head(skeleton), states
        self.entered: list[Entered] = []
        self.loss = 0.0
        self._windows = windows
        self._batches = make_batches([window.ids for window in windows], None)  # without padding, which would count
        calls = [Call(self.head.below(batch), batch=batch) for batch in self._batches]
        handle = skeleton.embedding.module.register_forward_hook(partial(_begun, states))
        try:
            with self.head.stopping():
                self._outputs = run_calls(skeleton, calls, _Taping(crew, self.entered, states), grad=True)
        finally:
            handle.remove()

    def through_head(self) -> None:
        """Takes the loss back to the output of the last block."""
        self.skeleton.load(self.head.unit)
        self.loss = sum(self.crew.results([partial(self._begin, number) for number in range(len(self._batches))]))
        self.skeleton.unload(self.head.unit)

    def _begin(self, number: int) -> float:
        batch, output = self._batches[number], self._outputs[number]
        self._outputs[number] = None
        last = hidden_states(output)
        chunk, total = max(LOGIT_BYTES // (4 * len(cast(Any, self.head.unit.module).weight)), 1), 0.0
        with _recording():
            ids = batch.ids.to(self.skeleton.device)
            hidden = last.detach().requires_grad_(True)
            for row, window in enumerate(batch.windows):
                for first in range(max(self._windows[window].context, 1) - 1, ids.shape[1] - 1, chunk):
                    wanted = ids[row, first + 1 : first + 1 + chunk]
                    logits = self.head.logits_of(output, hidden[row : row + 1, first : first + len(wanted)])
                    loss = nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
                    loss.backward()
                    total += float(loss.detach())
            if hidden.grad is not None:
                torch.autograd.backward([last], [hidden.grad])
        if not math.isfinite(total):
            raise NonFiniteError("the loss of the text is NaN or infinite", "Try --dtype float32.")
        return total

    def through(self, entered: Entered, batch: Callable[[int], AbstractContextManager] = nullcontext) -> None:
        """Takes the gradients at what a block gave back to what entered it. The block must be loaded. Each batch passes it within
        `batch(number)`, in a thread."""
        tasks = [partial(self._back, entered, number, batch) for number in range(len(entered.passes))]
        for _ in self.crew.results(tasks):
            pass

    def _back(self, entered: Entered, number: int, batch: Callable[[int], AbstractContextManager]) -> None:
        each, given = entered.passes[number], entered.outputs[number]
        assert each is not None
        entered.passes[number] = entered.outputs[number] = None
        inputs = [t for t in tensors((each.args, each.kwargs)) if t.requires_grad]
        fresh = {id(t): t.detach().requires_grad_(True) for t in inputs}
        args, kwargs = mapped((each.args, each.kwargs), lambda t: fresh.get(id(t), t))
        with _recording(), batch(number):
            outputs = zip(tensors(each.forward(*args, **kwargs)), tensors(given))
            pairs = [(ours, begun.grad) for ours, begun in outputs if begun.grad is not None and ours.requires_grad]
            if not pairs:
                return
            ends, arriving = zip(*pairs)
            found = torch.autograd.grad(ends, list(fresh.values()), arriving, allow_unused=True)
            entering = {id(t): t for t in inputs}
            back = {key: gradient for key, gradient in zip(fresh, found) if gradient is not None}
            # The code between blocks may lie on the way of several.
            torch.autograd.backward([entering[key] for key in back], list(back.values()), retain_graph=True)
        if self._states:
            for tensor in inputs:
                self._states.release(tensor)


class _Taping(Observer):
    """Keeps what enters each block, and lets autograd start anew from what it gives."""

    def __init__(self, crew: Crew, entered: list[Entered], states: WaitingStates | None):
        self.crew, self.entered, self._states = crew, entered, states

    def through(self, unit: Unit) -> Callable[[Sequence[Pass]], Iterator[Any]] | None:
        """See Observer."""
        return partial(self._pass, unit) if unit.index is not None else None

    def _pass(self, unit: Unit, passes: Sequence[Pass]) -> Iterator[Any]:
        self.entered.append(Entered(unit, list(passes), []))
        outputs = self.entered[-1].outputs
        for output in self.crew.results([partial(_without_graph, each, self._states) for each in passes]):
            outputs.append(mapped(output, _leaf))
            yield outputs[-1]


def _without_graph(each: Pass, states: WaitingStates | None) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        output = each.run()
        if states is None:
            return output
        output = states.apart(output)
        for tensor in tensors((each.args, each.kwargs)):
            states.release(tensor)
        return output


@contextmanager
def _recording() -> Iterator[None]:
    """While this lasts, autograd is on in this thread, also within inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _begun(states: WaitingStates | None, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """What the embedding gives, from where a graph begins: so the first block's inputs have a gradient as those of the others."""
    output = output.detach()
    return (output if states is None else states.apart(output)).requires_grad_(True)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(True) if tensor.is_floating_point() else tensor


def mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested tuples, lists and dicts, with every tensor changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        parts = [mapped(each, change) for each in tree]
        return type(tree)(parts) if type(tree) in (tuple, list) else type(tree)(*parts)  # a named tuple
    if isinstance(tree, dict):
        return {key: mapped(each, change) for key, each in tree.items()}
    return tree


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested tuples, lists and dicts, in their order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(each)
