"""LLM.int8() (arXiv:2208.07339, section 3.2, equation 8): vector-wise int8, but for the outlier columns of X.

A column of X is an outlier where any token of the sequence has |x| >= threshold in it. It multiplies unrounded, and the
tokens' scales leave its large values out. The paper multiplies it with the column of the 16-bit weight; bitsandbytes and
qcli keep no such weight, and multiply with the int8 column, dequantized to the dtype of X.
"""

from dataclasses import dataclass

import torch

from qcli.checkpoint.dtypes import ITEMSIZE
from qcli.methods.llm_int8 import LLMInt8
from qcli.simulation._base import Prepared, Simulation, size_of, times_transposed
from qcli.simulation.absmax import round_rows


class _Prepared(Prepared):
    """`original` is the 16-bit weight, or None where outlier columns come from the int8 one."""

    def __init__(self, weight: torch.Tensor, original: torch.Tensor | None, threshold: float):
        super().__init__(weight)
        self._original, self._threshold = original, threshold

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.float()
        outlier = x.abs() >= self._threshold
        columns = outlier.view(torch.uint8).amax(-2).bool() if x.numel() else outlier.any(-2)  # the quicker any()
        # A row's absmax leaves out its outliers, and takes in what is none in the same columns.
        rounded = round_rows(x.masked_fill(outlier, 0.0))
        return torch.where(columns.unsqueeze(-2), x, rounded), columns

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
        y = times_transposed(rounded.masked_fill(kept.unsqueeze(-2), 0.0), self.weight)
        sequences, outputs = (t.reshape(-1, *t.shape[-2:]) for t in (rounded, y))
        for sequence, output, columns in zip(sequences, outputs, kept.reshape(-1, kept.shape[-1])):
            columns = columns.nonzero().view(-1)
            output += sequence[:, columns] @ self._kept(columns, dtype).t()
        return y


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
