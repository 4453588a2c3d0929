"""What every module with a quantized weight has: one public base class, which is asked questions.

Parameters and buffers of a module carry the names of the stored tensors, with the dots after `weight` turned into underscores
(`weight.absmax` is `weight_absmax`), since a module's own names may hold none. `stored()` gives the names of the file back.
"""

import torch
from torch import nn


class QuantizedLinear(nn.Module):
    """A linear layer y = x W^T + bias with a quantized W [out_features, in_features]; `bias` as in nn.Linear."""

    one_text_a_call = False
    """Whether the tokens of a call share a choice, such as outlier columns, so that texts must not be mixed in a call."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`."""
        raise NotImplementedError

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in a checkpoint, relative to the module."""
        return {self.stored_name(name): tensor for name, tensor in self.state_dict().items()}

    def stored_name(self, name: str) -> str:
        """The name in a checkpoint of the attribute `name`."""
        return name
