"""Linear layers with 4-bit weights in blocks of the flattened weight: NF4 and FP4, in bitsandbytes' layout."""

from typing import Self

import torch

from qcli.codebooks import CODEBOOKS, DYNAMIC_MAP
from qcli.formats import Stored
from qcli.nn._fast_path import FastPath
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.linear_4bit import Prepared4bit, linear_4bit
from qcli.runtime.arguments import table
from qcli.schemes import NESTED_BLOCK_SIZE


class Linear4bit(FastPath, QuantizedLinear):
    """A 4-bit weight [out_features, in_features]: packed codes, absmax per block, or 8-bit absmax of double quantization.

    `tensors` maps attribute names (weight, weight_absmax, and with double quantization weight_nested_absmax) to the tensors as
    stored; meta tensors will do until they are loaded. The tables are the kernels' own.
    """

    _op, _prepare = staticmethod(linear_4bit), Prepared4bit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        tensors: dict[str, torch.Tensor],
        quant_type: str,
        block_size: int,
        nested_offset: float | None,
        compute_dtype: torch.dtype,
        dtype: torch.dtype,
    ):
        super().__init__(in_features, out_features, bias, {"weight_nested_absmax": None} | tensors, dtype)
        self.quant_type, self.block_size, self.compute_dtype = quant_type, block_size, compute_dtype
        self.nested_offset = nested_offset

    @classmethod
    def serves(cls, stored: Stored) -> bool:
        return stored.scheme.share == "flat" and stored.scheme.bits == 4

    @classmethod
    def of(
        cls, stored: Stored, tensors: dict[str, torch.Tensor], *, bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> Self:
        scheme = stored.scheme
        return cls(
            stored.in_features,
            stored.out_features,
            bias,
            tensors=tensors,
            quant_type=scheme.codebook,
            block_size=scheme.size,
            nested_offset=stored.nested_offset,
            compute_dtype=compute_dtype,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        double = ", double_quant" if self.weight_nested_absmax is not None else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{double}"

    def _arguments(self) -> tuple:
        return (
            self._packed(),
            self.weight_absmax,
            self.weight_nested_absmax,
            self.nested_offset or 0.0,
            self.bias,
            self.block_size,
            self.quant_type,
            self.out_features,
            self.compute_dtype,
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features]."""
        absmax = self.weight_absmax
        if self.weight_nested_absmax is not None:
            absmax = dequantize_absmax(absmax, self.weight_nested_absmax, self.nested_offset)
        shape = [self.out_features, self.in_features]
        return dequantize_4bit(self._packed(), absmax, self.block_size, self.quant_type, shape, dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight."""
        n, size, packed = self.in_features, self.block_size, self._packed().view(-1)
        if n % size == 0:  # a row has bytes and blocks of its own
            blocks = self._absmax(ids.unsqueeze(1) * (n // size) + torch.arange(n // size, device=ids.device))
            codes = packed.view(self.out_features, n // 2)[ids]
            return dequantize_4bit(codes, blocks.view(-1), size, self.quant_type, [len(ids), n], dtype)
        at = ids.unsqueeze(1) * n + torch.arange(n, device=ids.device)
        codes = torch.where(at % 2 == 0, packed[at // 2] >> 4, packed[at // 2] & 15)
        entries = table(CODEBOOKS[self.quant_type], ids.device)
        return (entries[codes.int()] * self._absmax(at // size)).to(dtype)

    def _absmax(self, blocks: torch.Tensor) -> torch.Tensor:
        """The absmax float32 of blocks of the flattened weight, by their numbers."""
        stored = self.weight_absmax.view(-1)[blocks]
        if self.weight_nested_absmax is None:
            return stored
        return (
            table(DYNAMIC_MAP, blocks.device)[stored.int()] * self.weight_nested_absmax.view(-1)[blocks // NESTED_BLOCK_SIZE]
            + self.nested_offset
        )

    def _packed(self) -> torch.Tensor:
        """The codes, two a byte, in whatever dtype they are stored."""
        return self.weight if self.weight.dtype == torch.uint8 else self.weight.view(torch.uint8)


MODULE = Linear4bit
