"""What every module with a quantized weight has: one public base class, which is asked questions.

Parameters and buffers of a module carry the names of the stored tensors, with the dots after `weight` turned into underscores
(`weight.absmax` is `weight_absmax`), since a module's own names may hold none. A format's `attribute` says which is which.
"""

from typing import Self

import torch
from torch import nn

from qcli.formats import Stored
from qcli.schemes import Scheme


class QuantizedLinear(nn.Module):
    """A linear layer y = x W^T + bias with a quantized W [out_features, in_features]; `bias` as in nn.Linear."""

    scheme: Scheme | None = None
    """What the weight is stored as; None for a module that was built by hand."""
    one_text_a_call = False
    """Whether the tokens of a call share a choice, such as outlier columns, so that texts must not be mixed in a call."""
    rounds_activations = False
    """Whether inputs are rounded, to int8 or to small floats. Setting it to False on a module that does keeps them in 16 bits."""
    rounds_few = False
    """Whether that holds for the few tokens of a decoding step on a CPU, too. It may be set to False likewise."""

    replaces_tensors = False
    """Whether `arrange` puts other tensors in the place of the stored ones. A head and an embedding that are tied then are one such
    module."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tensors: dict[str, torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        for name, tensor in tensors.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    @classmethod
    def serves(cls, stored: Stored) -> bool:
        """Whether this kind of module runs what is stored so."""
        raise NotImplementedError

    @classmethod
    def of(
        cls, stored: Stored, tensors: dict[str, torch.Tensor], *, bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> Self:
        """The module for `stored`. See qcli.nn.module_for."""
        raise NotImplementedError

    def arrange(self) -> None:
        """Lays the tensors out as the kernels read them, once they are loaded, where they are stored otherwise."""

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the weight by attribute."""
        parameters = {name: tensor.data for name, tensor in self._parameters.items() if tensor is not None and name != "bias"}
        return parameters | {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`."""
        raise NotImplementedError

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight [count, in_features] in `dtype`, by ids int64 [count]: the weight as an embedding."""
        raise NotImplementedError
