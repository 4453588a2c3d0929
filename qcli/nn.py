"""Modules that hold a quantized weight in its stored layout and call one op.

Their parameters and buffers carry the names of the stored tensors with the dots after `weight` turned into underscores
(`weight.absmax` is `weight_absmax`), since a module's names may hold none; `stored()` gives the names of the file back.
"""

from itertools import chain

import torch
from torch import nn

from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.linear_4bit import Prepared4bit, linear_4bit
from qcli.ops.linear_int8 import PreparedInt8, linear_int8
from qcli.ops.linear_w8a16 import linear_w8a16
from qcli.runtime import cpu


class _QuantizedLinear(nn.Module):
    """in_features, out_features and bias as in nn.Linear."""

    _prepared = None  # a CPU kernel's view of the weight, with the addresses of the tensors it was made from

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        few = self._prepare.MOST_TOKENS * self.in_features
        if not cpu.plain(x) or not 0 < x.numel() <= few or x.shape[-1] != self.in_features:
            return self._op(x, *self._arguments())
        # A decoding step is made of such calls, each on caches that weights have just filled: the way through the op, and
        # its checks, was measured at 7% of it.
        tensors = chain(self._parameters.values(), self._buffers.values())
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        kept = self._prepared
        if kept is None or kept[0] != addresses:  # a tensor may have been replaced
            kept = addresses, self._prepare(self.in_features, *self._arguments())
            # Not where it holds copies, which changes in place would not reach, nor where accelerate's hooks bring the
            # weight and take it away again: what is kept would keep it alive.
            if kept[1].addresses <= set(addresses) and "_hf_hook" not in self.__dict__:
                self.__dict__["_prepared"] = kept
        return kept[1](x)

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__.pop("_prepared", None)
        super().__setattr__(name, value)

    def _apply(self, *arguments, **options):
        self.__dict__.pop("_prepared", None)  # it keeps its tensors alive
        return super()._apply(*arguments, **options)

    def __getstate__(self):
        return {
            name: value for name, value in self.__dict__.items() if name != "_prepared"
        }  # addresses mean nothing there

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in a checkpoint, relative to the module."""
        return {self.stored_name(name): tensor for name, tensor in self.state_dict().items()}

    @staticmethod
    def stored_name(name: str) -> str:
        """The name in a checkpoint of the attribute `name`."""
        return name


class Linear4bit(_QuantizedLinear):
    """A 4-bit weight [out_features, in_features]: packed codes, absmax per block, or 8-bit absmax of double quantization.

    `tensors` maps attribute names (weight, weight_absmax, weight_quant_map, weight_quant_state, and with double quantization
    weight_nested_absmax, weight_nested_quant_map) to the tensors as stored; meta tensors will do until they are loaded.
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
        super().__init__(in_features, out_features, bias, dtype)
        self.quant_type, self.block_size, self.compute_dtype = quant_type, block_size, compute_dtype
        self.nested_offset = nested_offset
        self.weight_nested_absmax = None
        for name, tensor in tensors.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                if name in self.__dict__:
                    del self.__dict__[name]
                self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.weight_nested_absmax is not None else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{double}"

    def _arguments(self) -> tuple:
        return (
            self._packed(), self.weight_absmax, self.weight_nested_absmax, self.nested_offset or 0.0,
            self.bias, self.block_size, self.quant_type, self.out_features, self.compute_dtype,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features]."""
        absmax = self.weight_absmax
        if self.weight_nested_absmax is not None:
            absmax = dequantize_absmax(absmax, self.weight_nested_absmax, self.nested_offset)
        shape = [self.out_features, self.in_features]
        return dequantize_4bit(self._packed(), absmax, self.block_size, self.quant_type, shape, dtype)

    def _packed(self) -> torch.Tensor:
        """The codes, two a byte, in whatever dtype they are stored."""
        return self.weight if self.weight.dtype == torch.uint8 else self.weight.view(torch.uint8)

    def stored_name(self, name: str) -> str:
        """The name in a checkpoint of the attribute `name`."""
        if name == "weight_quant_state":
            return f"weight.quant_state.bitsandbytes__{self.quant_type}"
        return name.replace("weight_", "weight.", 1)


class Linear8bit(_QuantizedLinear):
    """An LLM.int8() weight: int8 [out_features, in_features] and SCB float32 [out_features], its rows' absmax.

    With `activations_in_int8` false the input is not rounded to int8 either (W8A16): nearer to the unquantized model.
    """

    activations_in_int8 = True
    _op, _prepare = staticmethod(linear_int8), PreparedInt8

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
        super().__init__(in_features, out_features, bias, dtype)
        self.threshold = threshold
        for name, tensor in tensors.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        kind = f"threshold={self.threshold}" if self.activations_in_int8 else "activations_in_int8=False"
        return f"{super().extra_repr()}, {kind}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        if self.activations_in_int8:
            return super().forward(x)
        return linear_w8a16(x, self.weight, self.SCB.view(-1), self.bias)

    def _arguments(self) -> tuple:
        return self.weight, self.SCB.view(-1), self.bias, self.threshold

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features]."""
        return dequantize_int8(self.weight, self.SCB.view(-1), dtype)
