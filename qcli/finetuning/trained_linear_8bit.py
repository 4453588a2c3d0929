"""A linear layer whose weight is trained while it runs as LLM.int8() will run it: bitsandbytes' `has_fp16_weights`.

The weight is a float32 Parameter. Each forward rounds it to the dtype of the model and its rows to int8, and computes what
qcli.nn.linear_8bit.Linear8bit computes from those codes. Gradients pass straight through both roundings: that of the input is the
gradient of the result times the dequantized weight. That of the weight is a product in the dtype of the input. bitsandbytes rounds
its factors to int8 too, along batch x length, and this is what harms training: SwitchBack (arXiv:2304.13013, section 2) keeps that
product in 16 bits, and so does this.
"""

from typing import Any

import torch
from torch import nn

from qcli.nn.linear_8bit import Linear8bit
from qcli.ops._library import product_dtype
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.schemes import PAPER_THRESHOLD


class TrainedLinear8bit(nn.Module):
    """y = x W^T + bias, where W is the float32 Parameter `weight` [out_features, in_features], rounded to `dtype` and then to int8.
    `bias` is frozen."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format))
        self.bias, self.dtype = bias, dtype

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 [out_features, in_features], absmax float32 [out_features]): what is stored of the weight as it is now."""
        with torch.no_grad():
            codes, absmax, _ = quantize_int8(self.weight.to(self.dtype), 0.0)
        return codes, absmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        y = linear_int8(x, *self.codes(), self.bias, PAPER_THRESHOLD)
        return _WithGradient.apply(y, x, self.weight) if torch.is_grad_enabled() else y

    def frozen(self) -> Linear8bit:
        """The module that runs the weight as it is now."""
        return linear_8bit(self.codes(), self.bias)


class _WithGradient(torch.autograd.Function):
    """y itself, which is a product of x [..., in] and the rounding of `weight` [out, in]. `weight` gets its gradient here, and x
    gets one through y."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (of_y,), (x,) = gradients, ctx.saved_tensors
        dtype = product_dtype(x, x.dtype)
        of_weight = of_y.flatten(0, -2).to(dtype).t() @ x.flatten(0, -2).to(dtype)
        return of_y, None, of_weight.float()


def linear_8bit(codes: tuple[torch.Tensor, torch.Tensor], bias: nn.Parameter | None) -> Linear8bit:
    """The module that runs codes int8 [out_features, in_features] with the absmax of their rows."""
    weight, absmax = codes
    module = Linear8bit(
        weight.shape[1],
        weight.shape[0],
        False,
        tensors={"weight": weight, "SCB": absmax},
        threshold=PAPER_THRESHOLD,
        dtype=torch.float32,
    )
    module.bias = bias
    return module
