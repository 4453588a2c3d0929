"""The diagonal of the Fisher information: how much the loss of texts bends along each weight, by squares of gradients.

Near a minimum the loss grows by half the sum of F_ij e_ij^2 where each weight is off by a small e_ij (SqueezeLLM, arXiv:2306.07629,
section 4.1). With x_t the input of a linear module at position t, and d_t the gradient of the loss of a window with respect to its
output there, it is estimated by
  F_ij = sum over t of (d_ti x_tj)^2
so that each position of a text is a sample. SqueezeLLM's own code squares the gradient of a whole window, the sum over t of
d_ti x_tj. The two differ by products of different positions, whose mean is near zero. But they are noise, and a window is then one
sample. On a llama of 1M parameters, with 48 windows of 256 tokens, tables of 3 bits by positions had a KL divergence of 0.207, and
by windows 0.222; tables of 4 bits were alike. By positions no gradient of a weight is ever made, so that memory has the sums alone.
"""

import threading

import torch

from qcli.calibration.listening import GradientListener, Met
from qcli.calibration.statistics import PANEL


class Fisher:
    """Of a weight [out_features, in_features]: `square` float32 of that shape, the sum of squares over positions. `tokens` counts
    these."""

    def __init__(self, out_features: int, in_features: int, device: torch.device):
        self.tokens = 0
        self.square = torch.zeros(out_features, in_features, device=device)

    @property
    def panels(self) -> int:
        """Into how many parts `add` is divided."""
        return -(-len(self.square) // PANEL)

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor, panel: int) -> None:
        """Counts squared inputs float32 [tokens, in_features] and squared gradients of the outputs float32 [tokens, out_features]
        in, for the weights of a panel of rows."""
        rows = slice(panel * PANEL, (panel + 1) * PANEL)
        self.square[rows].addmm_(gradients[:, rows].t(), inputs)
        self.tokens += len(inputs) if panel == 0 else 0

    @property
    def is_finite(self) -> bool:
        """Whether no gradient was NaN or too large to be squared."""
        return bool(self.square.isfinite().all())


class FisherGatherer(GradientListener):
    """Fisher information of linear modules of a block, by their names, summed up while the block's gradients are taken through it.
    A module that no gradient reaches is not in `found`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.found: dict[str, Fisher] = {}
        self._device, self._making = device, threading.Lock()

    def _add(self, number: int, seen: dict[str, Met]) -> None:
        for name, met in seen.items():
            inputs, gradients = (
                torch.cat([each.reshape(-1, each.shape[-1]).float() for each in side]).square_()
                for side in zip(*(each for each in met if len(each) > 1))
            )
            fisher = self._fisher(name, gradients.shape[1], inputs.shape[1])
            for panel in range(fisher.panels):
                self.turns.wait(number, (name, panel))
                fisher.add(inputs, gradients, panel)
                self.turns.pass_on(number, (name, panel))

    def _fisher(self, name: str, out_features: int, in_features: int) -> Fisher:
        with self._making:
            if name not in self.found:
                self.found[name] = Fisher(out_features, in_features, self._device)
            return self.found[name]
