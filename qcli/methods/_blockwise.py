"""Blockwise 4-bit quantization (QLoRA, arXiv:2305.14314, sections 2-3), shared by nf4 and fp4.

The weight [out_features, in_features] is taken as one flat row of blocks. Each block of `block_size` elements has its absmax and
one 4-bit code for each element: the nearest entry of a 16-entry codebook times absmax. Double quantization stores the absmax
values themselves in 8 bits, in groups of 256, around their mean (`nested_offset`).
"""

import torch

from qcli.methods._method import Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.error_4bit import error_4bit
from qcli.ops.fit_scale import fit_scale
from qcli.ops.quantize_4bit import quantize_4bit, quantize_with
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.schemes import NESTED_BLOCK_SIZE, Scheme

_NESTED_PIECE = 64 * NESTED_BLOCK_SIZE  # absmax values at a time, few enough for the cache


class BlockEncoder:
    """See qcli.methods._method.Encoder. `absmax` float32 [blocks] is whole once every chunk was fed."""

    def __init__(self, scheme: Scheme, count: int, device: torch.device, search: str = "none"):
        self.codebook, self.grain = scheme.codebook or "", scheme.size
        self.double_quant, self.searches = scheme.double_quant, search != "none"
        # Filled in place: small tensors kept one by one would pin the heap between the large ones that come and go.
        blocks = -(-count // scheme.size)
        self.absmax = torch.empty(blocks, device=device)
        sums = blocks if scheme.double_quant else 0
        # The stored absmax is known only at the end. What its change will add to the error follows from two sums for each block.
        # bfloat16 is enough for a term of second order, and a huge tensor has many blocks.
        self.slope = torch.empty(sums, dtype=torch.bfloat16, device=device)
        self.curve = torch.empty(sums, dtype=torch.bfloat16, device=device)
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        if self.searches:
            absmax, _ = fit_scale(chunk, self.grain, self.codebook, 4, False, torch.float32)
            packed = quantize_with(chunk, absmax, self.grain, self.codebook)
        else:
            packed, absmax = quantize_4bit(chunk, self.grain, self.codebook)
        sums, slope, curve = error_4bit(chunk, packed, absmax, self.grain, self.codebook)
        self.sums[start] = sums.tolist()
        place = slice(start // self.grain, start // self.grain + absmax.numel())
        self.absmax[place] = absmax
        if self.double_quant:
            self.slope[place], self.curve[place] = slope, curve
        return {"codes": packed}

    def finish(self) -> tuple[Parts, ErrorSums]:
        errors = add_up(self.sums)
        if not self.double_quant:
            return {"scale": self.absmax}, errors
        offset = mean_absmax(self.absmax)
        codes, nested_absmax = [], []
        slopes, curves = self.slope.split(_NESTED_PIECE), self.curve.split(_NESTED_PIECE)
        for piece, slope, curve in zip(self.absmax.split(_NESTED_PIECE), slopes, curves):
            code, nested = quantize_absmax(piece, offset)
            change = (dequantize_absmax(code, nested, offset) - piece).double()
            added = change * (change * curve.double() - 2 * slope.double())
            errors.squared_error += float(torch.nan_to_num(added, nan=0.0, posinf=0.0, neginf=0.0).sum())
            codes.append(code)
            nested_absmax.append(nested)
        parts = {
            "scale": torch.cat(codes),
            "nested_scale": torch.cat(nested_absmax),
            "nested_offset": torch.tensor(offset, dtype=torch.float64),
        }
        return parts, errors


def decode_blocks(parts: Parts, block_size: int, codebook: str, out_features: int, in_features: int) -> torch.Tensor:
    """The weight float32 [out_features, in_features] that all parts together stand for."""
    absmax = parts["scale"]
    if "nested_scale" in parts:
        absmax = dequantize_absmax(absmax, parts["nested_scale"], float(parts["nested_offset"]))
    return dequantize_4bit(parts["codes"], absmax, block_size, codebook, [out_features, in_features], torch.float32)
