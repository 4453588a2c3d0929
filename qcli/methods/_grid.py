"""The values that the codes of a weight may stand for, once its scales are fixed: what calibrated rounding chooses from.

A scheme says what a code stands for: (entry - zero_point) * scale, with the entry of a codebook or the code itself. A method finds
the scales of a whole weight, as they will be stored. Then every column is a list of scales, one a row, and a value of the column is
rounded to the nearest multiple of its scale that has a code.
"""

from dataclasses import dataclass, replace

import torch

from qcli.codebooks import CODEBOOKS, E2M1, NF3, ZERO_CODE
from qcli.methods._groups import Rounded
from qcli.methods._method import Parts
from qcli.ops._grid import divisors, round_entries
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.packing import pack_4bit
from qcli.runtime.arguments import table
from qcli.schemes import Scheme

_VALUES = {"nf4": CODEBOOKS["nf4"], "fp4": CODEBOOKS["fp4"], "nf3": NF3, "e2m1": E2M1}


@dataclass(frozen=True)
class Grid:
    """scale float32 [out_features, groups], and zero_point of that shape or None. Column k has group k // size; with flat blocks
    that rows divide, each column is a group of its own.

    parts: what is stored beside the codes, by role. dtype: in which (entry - zero_point) * scale is rounded; None for float32.
    """

    scheme: Scheme
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    size: int
    parts: Parts
    dtype: torch.dtype | None = None

    def group(self, column: int) -> int:
        """The group of a column."""
        return column // self.size

    def entries(self, v: torch.Tensor, zero: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest codes of values v float32 in units of their scales, and what they stand for in these units, float32. `zero`
        has the zero points. Codes are int8 for integers, uint8 for codebooks, and float8 for E4M3."""
        return round_entries(v, zero, self.scheme.codebook or "", self.scheme.bits)

    def round(self, w: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and values float32 nearest to w float32 [out_features], the column `column` of a weight."""
        group = self.group(column)
        scale = self.scale[:, group]
        zero = None if self.zero_point is None else self.zero_point[:, group]
        codes, entries = self.entries(w / divisors(scale, self.scheme.codebook or ""), zero)
        return codes, self._product(entries, scale)

    def entries_of(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [out_features, in_features] stand for in units of their scales, float32."""
        scheme = self.scheme
        if scheme.codebook == "e4m3":
            return codes.float()
        if scheme.codebook:
            return table(_VALUES[scheme.codebook], codes.device)[codes.int()]
        zero = self.zero_point
        return codes.float() if zero is None else codes - zero.repeat_interleave(self.size, 1)[:, : codes.shape[1]]

    def values(self, entries: torch.Tensor) -> torch.Tensor:
        """What entries float32 [out_features, in_features] stand for."""
        return self._product(entries, self.spread(entries.shape[1]))

    def spread(self, columns: int) -> torch.Tensor:
        """The scale of every element [out_features, columns]."""
        return self.scale.repeat_interleave(self.size, 1)[:, :columns]

    def _product(self, entries: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        product = entries * scale
        return product if self.dtype is None else product.to(self.dtype).float()

    def all_parts(self, codes: torch.Tensor) -> Parts:
        """Every part of a weight with these codes [out_features, in_features]."""
        if self.scheme.share == "flat":
            return {"codes": pack_4bit(codes.flatten(), ZERO_CODE[self.scheme.codebook or ""]), **self.parts}
        return {"codes": codes, **self.parts}

    @property
    def divides_rows(self) -> bool:
        """Whether a block lies in more than one row."""
        return self.scheme.share == "flat" and self.size != self.scheme.size

    def with_scale(self, scale: torch.Tensor) -> "Grid":
        """The same grid with other scales float32 [out_features, groups], rounded as they will be stored."""
        if self.scheme.share == "flat":
            return block_grid(self.scheme, scale.flatten(), self.scale.shape[0], self.scale.shape[1] * self.size)
        stored = scale.to(self.parts["scale"].dtype)
        return replace(self, scale=stored.float(), parts=self.parts | {"scale": stored})


def block_grid(scheme: Scheme, absmax: torch.Tensor, out_features: int, in_features: int) -> Grid:
    """The grid of flat blocks with `absmax` float32 [blocks], which double quantization rounds."""
    parts: Parts = {"scale": absmax}
    if scheme.double_quant:
        offset = mean_absmax(absmax)
        codes, nested = quantize_absmax(absmax, offset)
        parts = {"scale": codes, "nested_scale": nested, "nested_offset": torch.tensor(offset, dtype=torch.float64)}
        absmax = dequantize_absmax(codes, nested, offset)
    if in_features % scheme.size == 0:
        return Grid(scheme, absmax.view(out_features, -1), None, scheme.size, parts)
    wide = absmax.repeat_interleave(scheme.size)[: out_features * in_features]
    return Grid(scheme, wide.view(out_features, in_features), None, 1, parts)


def group_grid(scheme: Scheme, rounded: Rounded, in_features: int, global_scale: torch.Tensor | None, dtype: torch.dtype) -> Grid:
    """The grid of groups, rows, blocks or a whole weight with the scales of `rounded`, whose columns may be `filled_up`. dtype is
    that of the weight."""
    scale, out_features = rounded.scale, rounded.codes.shape[0]
    parts: Parts = {"scale": scale}
    if scheme.scale == "e8m0":
        wide = torch.exp2(scale.float() - 127)
    elif global_scale is not None:
        wide, parts["global_scale"] = scale.float() / global_scale, global_scale.cpu()
    else:
        wide = scale.float()
    if rounded.zero_point is not None:
        parts["zero_point"] = rounded.zero_point
    if scheme.share == "block":
        wide = wide.repeat_interleave(scheme.size, 0)[:out_features]
    elif scheme.share == "tensor":
        wide = wide.view(1, 1).expand(out_features, 1)
    size = scheme.size if scheme.share in ("group", "block") else in_features
    zero_point = None if rounded.zero_point is None else rounded.zero_point.float()
    return Grid(
        scheme, wide.contiguous(), zero_point, size, parts, dtype if scheme.scale == "model" and scheme.codebook != "nf3" else None
    )
