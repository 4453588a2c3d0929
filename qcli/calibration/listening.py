"""What passes the linear modules of a block while gradients come back through it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from qcli.calibration.statistics import Turns

Met = list[list[torch.Tensor]]
"""Of a module, call by call: its input, and the gradient at its output where one arrived."""


class GradientListener:
    """Hears of the inputs of linear modules, and of the gradients of the loss at their outputs. Subclasses say what is kept, in the
    `turns` of the batches where sums depend on their order."""

    def __init__(self) -> None:
        self.turns, self._here = Turns(), threading.local()

    @contextmanager
    def listening(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """While this lasts, what passes the `modules` counts. Every batch passes once."""
        self.turns = Turns()
        handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module, args, output):
            seen = getattr(self._here, "seen", None)
            if seen is not None and output.requires_grad:
                met = [args[0].detach()]
                seen.setdefault(name, []).append(met)
                output.register_hook(partial(_note, met))

        return hook

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """While this lasts, what passes in this thread, forward and backward, is the batch `number`. Then it is added."""
        self._here.seen = {}
        with self.turns.batch(number):
            try:
                yield
                self._add(number, {name: met for name, met in self._here.seen.items() if any(len(each) > 1 for each in met)})
            finally:
                self._here.seen = None

    def _add(self, number: int, seen: dict[str, Met]) -> None:
        """Adds what a batch left at the modules that a gradient reached."""
        raise NotImplementedError


def _note(met: list[torch.Tensor], gradient: torch.Tensor) -> None:
    met.append(gradient.detach())
