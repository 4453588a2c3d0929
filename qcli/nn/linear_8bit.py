"""Linear layers with int8 weights, a scale for each output row, and rounded activations: LLM.int8() in bitsandbytes' layout, and
W8A8 in compressed-tensors'."""

from typing import Self

import torch

from qcli.formats import Stored
from qcli.nn._fast_path import FastPath
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.linear_int8 import PreparedInt8, linear_int8
from qcli.ops.linear_w8a16 import PreparedW8A16, linear_w8a16


class Linear8bit(FastPath, QuantizedLinear):
    """An LLM.int8() weight: int8 [out_features, in_features], or those codes in one column, and SCB float32 [out_features], its
    rows' absmax. Where texts have chosen columns, outlier_columns int32 [n] has their numbers and outlier_weight [out_features, n]
    those columns of the weight in 16 bits: they are never rounded, and the threshold then guards against all others.

    With `rounds_activations` false the input is not rounded to int8 either (W8A16): nearer to the unquantized model. With
    `rounds_few` false that holds on a CPU for the few tokens of a decoding step alone. There the product is bound by memory, and
    rounding saves nothing. In both cases all columns come from the codes.
    """

    rounds_activations = True
    rounds_few = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        tensors: dict[str, torch.Tensor],
        threshold: float,
        dtype: torch.dtype,
    ):
        super().__init__(in_features, out_features, bias, tensors, dtype)
        self.threshold = threshold

    @classmethod
    def serves(cls, stored: Stored) -> bool:
        scheme = stored.scheme
        in_int8 = scheme.activations == "token" and scheme.activation_codebook is None
        return scheme.share == "row" and scheme.bits == 8 and in_int8 and not scheme.zero_point and scheme.codebook is None

    @classmethod
    def of(
        cls, stored: Stored, tensors: dict[str, torch.Tensor], *, bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> Self:
        threshold = stored.scheme.threshold
        return cls(stored.in_features, stored.out_features, bias, tensors=tensors, threshold=threshold, dtype=dtype)

    def extra_repr(self) -> str:
        kind = f"threshold={self.threshold}" if self.rounds_activations else "rounds_activations=False"
        return f"{super().extra_repr()}, {kind}"

    def arrange(self) -> None:
        """Makes the absmax of rows of their scales, where those are stored. Called once the tensors are loaded."""
        scale = getattr(self, "weight_scale", None)
        if scale is not None:
            del self.weight_scale
            self.register_buffer("SCB", scale.float().view(-1) * 127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        self.arrange()
        return super().forward(x)

    def for_few_tokens(self):
        self.arrange()
        return super().for_few_tokens()

    @property
    def one_text_a_call(self) -> bool:
        """Outlier columns are those of all tokens of a call."""
        return self.rounds_activations and self.threshold > 0

    @property
    def _op(self):
        return linear_int8 if self.rounds_activations else linear_w8a16

    @property
    def _prepare(self):
        return PreparedInt8 if self.rounds_activations and self.rounds_few else PreparedW8A16

    @property
    def _codes(self) -> torch.Tensor:
        return self.weight.view(self.out_features, self.in_features)

    @property
    def _fixed(self) -> tuple[torch.Tensor, ...]:
        """The columns that texts have chosen, and the weight there; empty without any."""
        columns = getattr(self, "outlier_columns", None)
        return () if columns is None else (columns, self.outlier_weight)

    def _arguments(self) -> tuple:
        weight = self._codes, self.SCB.view(-1), self.bias
        return (*weight, self.threshold, *self._fixed) if self.rounds_activations else weight

    def _few_arguments(self) -> tuple:
        weight = self._codes, self.SCB.view(-1), self.bias
        return (*weight, self.threshold, *self._fixed) if self._prepare is PreparedInt8 else weight

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features]."""
        self.arrange()
        weight = dequantize_int8(self._codes, self.SCB.view(-1), dtype)
        for columns, kept in [self._fixed] if self._fixed else []:
            weight = weight.index_copy(1, columns.long(), kept.to(dtype))
        return weight

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight."""
        return dequantize_int8(self._codes[ids], self.SCB.view(-1)[ids], dtype)


MODULE = Linear8bit
