"""Absmax int8 (arXiv:2208.07339, section 2): q = round(x * 127 / absmax), which stands for q * absmax / 127.

Shared by `int8` and `llm-int8`. Rounding is that of qcli.ops.quantize_int8.
"""

from collections.abc import Sequence

import torch

from qcli.checkpoint.dtypes import torch_dtype
from qcli.methods._groups import Rounded
from qcli.methods._method import Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.error_int8 import error_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.ops.round_integers import round_integers


class RowEncoder:
    """One float32 scale for each row. See qcli.methods._method.Encoder. `absmax` float32 [rows] is whole at the end."""

    def __init__(self, rows: int, columns: int, device: torch.device):
        self.grain = columns
        self.absmax = torch.empty(rows, device=device)
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        chunk = chunk.view(-1, self.grain)
        codes, absmax, _ = quantize_int8(chunk, 0.0)
        self.sums[start] = error_int8(chunk, codes, absmax).tolist()
        row = start // self.grain
        self.absmax[row : row + absmax.numel()] = absmax
        return {"codes": codes}

    def finish(self) -> tuple[Parts, ErrorSums]:
        return {"scale": self.absmax}, add_up(self.sums)


class ColumnsEncoder(RowEncoder):
    """The same, and `columns`, ascending, which are also stored as they are, in the 16 bits of the code `stored`. The error is that
    of what both stand for together."""

    def __init__(self, rows: int, in_features: int, device: torch.device, columns: Sequence[int], stored: str):
        super().__init__(rows, in_features, device)
        self.columns = torch.tensor(columns, dtype=torch.int32, device=device)
        self.kept = torch.empty(rows, len(columns), dtype=torch_dtype(stored), device=device)

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        parts = super().feed(chunk, start)
        places, first = self.columns.long(), start // self.grain
        kept = chunk.view(-1, self.grain)[:, places]
        rows = slice(first, first + len(kept))
        self.kept[rows] = kept
        wide, coded = kept.float(), dequantize_int8(parts["codes"][:, places].contiguous(), self.absmax[rows], torch.float32)
        spared = ((wide - coded).square() - (wide - self.kept[rows].float()).square()).sum(dtype=torch.float64)
        self.sums[start][0] = max(self.sums[start][0] - float(spared.nan_to_num(0.0)), 0.0)
        return parts

    def finish(self) -> tuple[Parts, ErrorSums]:
        parts, errors = super().finish()
        return parts | {"outlier_columns": self.columns, "outlier_weight": self.kept}, errors


def round_to_rows(rows: torch.Tensor, absmax: float) -> Rounded:
    """Rows with a scale each, absmax / 127 in their own dtype. A row of zeros has the scale eps."""
    codes, scale, _, sums = round_integers(rows, rows.shape[1], -127, 127, False)
    return Rounded(codes, scale, None, sums)


def decode_rows(parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
    """The weight float32 [out_features, in_features] of codes with as many scales as rows, or with one, and of columns that stand
    beside them in 16 bits."""
    scale = parts["scale"]
    codes = parts["codes"].view(len(scale), -1)
    weight = dequantize_int8(codes, scale, torch.float32).view(out_features, in_features)
    if "outlier_columns" in parts:
        weight.index_copy_(1, parts["outlier_columns"].long(), parts["outlier_weight"].float())
    return weight
