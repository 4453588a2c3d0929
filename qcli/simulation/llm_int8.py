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
from qcli.simulation._base import Prepared, Simulation, size_of, times_transposed
from qcli.simulation.absmax import round_rows


class _Prepared(Prepared):
    """`original` is the 16-bit weight, or None where outlier columns come from the int8 one."""

    keeps_columns = True

    def __init__(self, weight: torch.Tensor, original: torch.Tensor | None, threshold: float):
        super().__init__(weight)
        self._original, self._threshold = original, threshold

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not x.numel():
            return super().activations(x)
        sequences = x.reshape(-1, *x.shape[-2:]).float()
        found = [quantize_int8(sequence, self._threshold) for sequence in sequences]
        q, absmax, kept = (torch.cat(parts) for parts in zip(*found))
        rounded, kept = dequantize_int8(q, absmax, torch.float32).view(sequences.shape), kept.view(len(sequences), -1)
        for rows, columns in _alike(kept):
            rounded[rows, :, columns] = sequences[rows, :, columns]
        return rounded.view(x.shape), kept.view(*x.shape[:-2], -1)

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
        if not rounded.numel():
            return super()._product(rounded, kept, dtype)
        y = times_transposed(rounded * (~kept).float().unsqueeze(-2), self.weight)
        x, outputs = (t.reshape(-1, *t.shape[-2:]) for t in (rounded, y))
        for rows, columns in _alike(kept.reshape(-1, kept.shape[-1])):
            outputs[rows] += times_transposed(x[rows][..., columns], self._kept(columns, dtype))
        return y


def _alike(kept: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """Runs of sequences of kept [sequences, columns] that keep the same columns, with those columns; without such as keep none."""
    masks = [mask.tobytes() for mask in kept.cpu().numpy()]
    starts = [row for row, mask in enumerate(masks) if not row or mask != masks[row - 1]]
    found = [(slice(a, b), kept[a].nonzero().view(-1)) for a, b in zip(starts, [*starts[1:], len(masks)])]
    return [(rows, columns) for rows, columns in found if columns.numel()]


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


SIMULATIONS = (DecomposedInt8("LLM.int8() paper", from_original=True), DecomposedInt8("LLM.int8()", from_original=False))
