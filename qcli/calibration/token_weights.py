"""How much each token counts for a linear module: by the squared gradient of the loss at its outputs.

GPTQ makes ||E x||^2 small, summed over tokens, as if each output at each token mattered alike. To second order the loss grows by
the square of d E x, where d is the gradient at the outputs. With all outputs alike this is ||d||^2 ||E x||^2, up to a factor: the
same sum, in which each token counts by ||d||^2. Modules that read one input, as q, k and v do, share a Hessian. A token counts
there by what it counts for all of them together.
"""

import threading
from collections.abc import Sequence

import torch

from qcli.calibration.listening import GradientListener, Met


class TokenWeights(GradientListener):
    """By module and batch, the squared norms of gradients at the outputs, float32 [tokens]."""

    def __init__(self) -> None:
        super().__init__()
        self._squares: dict[str, dict[int, torch.Tensor]] = {}
        self._means: dict[tuple[str, ...], float] = {}
        self._noting = threading.Lock()

    def _add(self, number: int, seen: dict[str, Met]) -> None:
        for name, met in seen.items():
            found = torch.cat([_squares(*each) for each in met])
            with self._noting:
                self._squares.setdefault(name, {})[number] = found

    def of(self, modules: Sequence[str], batch: int) -> torch.Tensor | None:
        """What tokens count for `modules`, which read the same input, with a mean of 1 over all batches: float32 [tokens of the
        batch]. None where no gradient reached any of them."""
        known = tuple(sorted(name for name in modules if name in self._squares))
        found = [self._squares[name][batch] for name in known if batch in self._squares[name]]
        if not found:
            return None
        with self._noting:
            if known not in self._means:
                count = sum(len(each) for each in self._squares[known[0]].values())
                total = sum(float(each.sum(dtype=torch.float64)) for name in known for each in self._squares[name].values())
                self._means[known] = total / count
        return sum(found[1:], found[0]) / max(self._means[known], torch.finfo(torch.float32).tiny)

    def forget(self, modules: Sequence[str]) -> None:
        """Drops what is known of `modules`."""
        for name in modules:
            self._squares.pop(name, None)


def _squares(inputs: torch.Tensor, gradient: torch.Tensor | None = None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros(inputs.numel() // inputs.shape[-1], device=inputs.device)
    return gradient.reshape(-1, gradient.shape[-1]).float().square().sum(1)
