"""What every simulated method has: a weight as the method keeps it, and the linear layer computed from it.

y = X^ W^T + bias in float32, where X^ and W^ are the values that the method's integers or codes stand for. The activations
of one sequence are taken together and those of two never are, so that neither a scale of "the tensor" nor the outlier
columns of LLM.int8() depend on how sequences are batched. Sequences of one length are rounded in the same few operations and
multiplied in one product all the same.
"""

from collections.abc import Callable
from math import prod

import torch

from qcli.checkpoint.dtypes import TensorSpec


class Prepared:
    """A weight [out_features, in_features] under a method: `weight` is W^, float32. `rounding` makes X^ of activations, float32
    [..., tokens, in_features], each sequence by itself; None leaves them whole."""

    keeps_columns = False  # whether some columns of activations stay in 16 bits

    def __init__(self, weight: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.weight, self._rounding = weight, rounding

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X^ of x [..., tokens, in_features], in float32, and the columns that each sequence keeps in 16 bits, bool
        [..., in_features]. They do not depend on the weight."""
        x = x.float()
        kept = torch.zeros(*x.shape[:-2], x.shape[-1], dtype=torch.bool, device=x.device)
        return (self._rounding(x) if self._rounding and x.numel() else x), kept

    def weight_for(self, kept: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W^ float32 as activations of `dtype` meet it, where the columns `kept`, bool [in_features], stay in 16 bits."""
        return self.weight

    def product(
        self, rounded: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """X^ W^T + bias, [..., tokens, out_features] in `dtype`, of what `activations` gave for x of that dtype. bias
        [out_features] or None."""
        y = self._product(rounded, kept, dtype)
        if bias is not None:
            y += bias.float()
        return y.to(dtype)

    def _product(self, rounded: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """X^ W^T, float32."""
        return times_transposed(rounded, self.weight_for(kept, dtype))

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., tokens, in_features], float32 or 16 bits, to [..., tokens, out_features] in x's dtype, one sequence after
        another along the leading dimensions; x [in_features] is a sequence of one token. bias [out_features] or None."""
        sequences = x if x.dim() > 1 else x.unsqueeze(0)
        y = self.product(*self.activations(sequences), x.dtype, bias)
        return y if x.dim() > 1 else y.squeeze(0)


def times_transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., tokens, in_features] by weight [out_features, in_features]: every row in one product."""
    return (x.reshape(-1, x.shape[-1]) @ weight.t()).view(*x.shape[:-1], len(weight))


class Simulation:
    """A method of the comparison. `name` is what users see."""

    name: str

    def weight(self, weight: torch.Tensor) -> Prepared:
        """Quantizes a weight [out_features, in_features], given in the dtype that it is stored in."""
        raise NotImplementedError

    def stored_bytes(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> int:
        """Bytes that a weight of `shape` [out_features, in_features] takes, scales and tables included, where `dtype` is the
        safetensors code of the unquantized one. `outlier_columns` stand in it beside the quantized ones, for the method that
        keeps some."""
        raise NotImplementedError

    def bits_per_weight(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> float:
        """8 * stored_bytes over the number of weights."""
        return 8 * self.stored_bytes(shape, dtype, outlier_columns) / prod(shape)


def size_of(specs: list[TensorSpec]) -> int:
    """Bytes of tensors."""
    return sum(spec.nbytes for spec in specs)
