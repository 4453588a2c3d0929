"""What a LoRA adapter adds to a linear module: y + (scaling B) (A x), a forward hook of the module.

A hook leaves the module, its name and its weight as they are, so that it works on every kind of module, on one whose weight is
read for each call, and on one whose weight is elsewhere until then.
"""

import torch
from torch import nn


class LowRank:
    """`a` [r, in_features] and `b` [out_features, r], with the scaling in it. They follow the outputs of the module: sums are those
    of its dtype's products, which torch makes in float32, and what is added is rounded together with the module's output."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        self.a, self.b = a, b
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        a, b = self.like(output)
        inner = nn.functional.linear(inputs[0].to(output.dtype), a)
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), b.t()).view_as(output)

    def like(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) on the device of `output` and in its dtype. Copies are kept."""
        key = output.device, output.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # autograd may meet them later
                self._copies[key] = self.a.to(*key), self.b.to(*key)
        return self._copies[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the two matrices."""
        return self.a.nbytes + self.b.nbytes


def added_to(module: nn.Module) -> LowRank | None:
    """What an adapter adds to the output of `module`; None for one without."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, LowRank)), None)


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of the matrices of all modules."""
    return sum(added.nbytes for module in model.modules() if (added := added_to(module)))
