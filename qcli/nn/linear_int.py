"""Linear layers with integer weights in groups of a row, in compressed-tensors' packed layout.

There is no kernel for them yet: each call expands the weight and hands the product to torch.
"""

from typing import Self

import torch

from qcli.formats import Stored
from qcli.methods.rtn import values_of
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.packing import unpack_words


class LinearInt(QuantizedLinear):
    """`weight`, int32 words of codes, `weight_scale` [out_features, groups] and, packed along the rows, `weight_zero_point`."""

    def __init__(self, stored: Stored, tensors: dict[str, torch.Tensor], bias: bool, dtype: torch.dtype):
        super().__init__(stored.in_features, stored.out_features, bias, {"weight_zero_point": None} | tensors, dtype)
        self.bits, self.group_size = stored.scheme.bits, stored.scheme.size

    @classmethod
    def serves(cls, stored: Stored) -> bool:
        return stored.format == "compressed-tensors" and stored.scheme.share == "group"

    @classmethod
    def of(
        cls, stored: Stored, tensors: dict[str, torch.Tensor], *, bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> Self:
        return cls(stored, tensors, bias, dtype)

    def extra_repr(self) -> str:
        zero = ", zero_point" if self.weight_zero_point is not None else ""
        return f"{super().extra_repr()}, {self.bits} bits, group_size={self.group_size}{zero}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`."""
        zero_point = self.weight_zero_point
        if zero_point is not None:
            zero_point = unpack_words(zero_point.t(), self.bits, self.out_features).t()
        codes = unpack_words(self.weight, self.bits, self.in_features)
        return values_of(codes, self.weight_scale, zero_point, self.group_size).to(dtype)


MODULE = LinearInt
