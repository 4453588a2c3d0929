"""LLM.int8() (arXiv:2208.07339, section 3.2, equation 8): vector-wise int8, but for the outlier columns of X.

A column of X is an outlier where any token of the sequence has |x| >= threshold in it. It multiplies unrounded, and the
tokens' scales leave its large values out. The paper multiplies it with the column of the 16-bit weight; bitsandbytes and
qcli keep no such weight, and multiply with the int8 column, dequantized to the dtype of X.
"""

from dataclasses import dataclass

import torch

from qcli.checkpoint.dtypes import ITEMSIZE
from qcli.methods.llm_int8 import LLMInt8
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.simulation._base import Prepared, Simulation, size_of
from qcli.simulation.absmax import round_rows


class _Prepared(Prepared):
    """`original` is the 16-bit weight, or None where outlier columns come from the int8 one."""

    def __init__(self, weight: torch.Tensor, original: torch.Tensor | None, threshold: float):
        super().__init__(weight)
        self._original, self._threshold = original, threshold

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, absmax, outliers = quantize_int8(x, self._threshold)
        rounded, columns = dequantize_int8(q, absmax, torch.float32), outliers.nonzero().view(-1)
        return rounded.index_copy_(1, columns, x[:, columns].float()), outliers

    def weight_for(self, kept: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        columns = kept.nonzero().view(-1)
        if not columns.numel() or (self._original is None and dtype == torch.float32):
            return self.weight
        return self.weight.index_copy(1, columns, self._kept(columns, dtype))

    def _kept(self, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        source = self.weight if self._original is None else self._original
        return source[:, columns].to(dtype).float()

    def _product(self, rounded: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # In two parts, for a copy of the whole weight for each sequence takes longer than the product.
        columns = kept.nonzero().view(-1)
        ordinary = rounded.index_fill(1, columns, 0.0)
        return ordinary @ self.weight.t() + rounded[:, columns] @ self._kept(columns, dtype).t()


@dataclass(frozen=True)
class DecomposedInt8(Simulation):
    """Outlier columns from the 16-bit weight (the paper's form) or from the int8 one (as it is stored and run)."""

    name: str
    from_original: bool
    threshold: float = 6.0

    def weight(self, weight: torch.Tensor) -> Prepared:
        return _Prepared(round_rows(weight), weight if self.from_original else None, self.threshold)

    def stored_bytes(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> int:
        beside = outlier_columns * shape[0] * ITEMSIZE[dtype] if self.from_original else 0
        return size_of(LLMInt8().outputs("weight", *shape, dtype)) + beside


SIMULATIONS = (
    DecomposedInt8("LLM.int8() paper", from_original=True),
    DecomposedInt8("LLM.int8()", from_original=False),
)
