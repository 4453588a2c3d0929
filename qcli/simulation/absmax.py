"""Absmax int8 (arXiv:2208.07339, section 2): q = round(x * 127 / absmax), standing for q * absmax / 127.

Table 1 of the paper compares three choices of what shares an absmax: all of X and all of W (per-tensor), each token of X and
all of W (row-wise), each token of X and each output row of W (vector-wise). Rounding is that of qcli.ops.quantize_int8.
"""

from dataclasses import dataclass
from math import prod

import torch

from qcli.methods.llm_int8 import LLMInt8
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.simulation._base import Prepared, Simulation, size_of


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., columns] with a scale for each row, as float32."""
    q, absmax, _ = quantize_int8(x.reshape(-1, x.shape[-1]), 0.0)
    return dequantize_int8(q, absmax, torch.float32).view(x.shape)


def round_tensor(x: torch.Tensor) -> torch.Tensor:
    """x [..., rows, columns] with a scale for each matrix, as float32."""
    return round_rows(x.flatten(-2)).view(x.shape)


@dataclass(frozen=True)
class Absmax(Simulation):
    """A scale per token or one, and a scale per output row or one."""

    name: str
    per_token: bool
    per_row: bool

    def weight(self, weight: torch.Tensor) -> Prepared:
        return Prepared((round_rows if self.per_row else round_tensor)(weight), round_rows if self.per_token else round_tensor)

    def stored_bytes(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> int:
        if self.per_row:
            return size_of(LLMInt8().outputs("weight", *shape, dtype))
        return prod(shape) + 4  # one float32 scale


SIMULATIONS = (
    Absmax("int8 per-tensor", per_token=False, per_row=False),
    Absmax("int8 row-wise", per_token=True, per_row=False),
    Absmax("int8 vector-wise", per_token=True, per_row=True),
)
