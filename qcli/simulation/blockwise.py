"""NF4 and FP4 (QLoRA, arXiv:2305.14314, sections 2-3): 4-bit weights in blocks of 64; activations are whole.

The codes are those that `qcli quantize` stores. The product takes the weight in the dtype of the activations, as
bitsandbytes does.
"""

from dataclasses import dataclass

import torch

from qcli.methods._blockwise import Blockwise4bit
from qcli.methods.fp4 import FP4
from qcli.methods.nf4 import NF4
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.simulation._base import Prepared, Simulation, size_of


class _Prepared(Prepared):
    def weight_for(self, kept: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.weight.to(dtype).float()


@dataclass(frozen=True)
class Blockwise(Simulation):
    """A 4-bit method, with its options."""

    name: str
    method: Blockwise4bit

    def weight(self, weight: torch.Tensor) -> Prepared:
        block_size, quant_type = self.method.block_size, self.method.name
        packed, absmax = quantize_4bit(weight, block_size, quant_type)
        if self.method.double_quant:
            offset = mean_absmax(absmax)
            absmax = dequantize_absmax(*quantize_absmax(absmax, offset), offset)
        shape = list(weight.shape)
        return _Prepared(dequantize_4bit(packed, absmax, block_size, quant_type, shape, torch.float32))

    def stored_bytes(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> int:
        return size_of(self.method.outputs("weight", *shape, dtype))


SIMULATIONS = (
    Blockwise("NF4", NF4(double_quant=False)),
    Blockwise("NF4+DQ", NF4(double_quant=True)),
    Blockwise("FP4", FP4(double_quant=False)),
)
