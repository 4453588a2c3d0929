"""Blockwise 4-bit quantization (QLoRA, arXiv:2305.14314, sections 2-3), shared by nf4 and fp4.

The weight [out_features, in_features] is taken as one flat row of blocks; each block of `block_size` elements stores its
absmax and one 4-bit code per element, the nearest entry of a 16-entry codebook times absmax. Double quantization stores
the absmax values themselves in 8 bits, in groups of 256, around their mean (`nested_offset`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcli import codebooks
from qcli.checkpoint.dtypes import TensorSpec
from qcli.errors import UsageError
from qcli.formats import bitsandbytes as bnb_format
from qcli.methods._base import Result, add_up
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.error_4bit import error_4bit
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax

_NESTED_PIECE = 1 << 14  # blocks at a time, for the cache; a multiple of bitsandbytes' 256


@dataclass(frozen=True)
class Blockwise4bit:
    """Options of the 4-bit methods: elements per absmax, and whether the absmax values are quantized too."""

    block_size: int = 64
    double_quant: bool = True

    name: ClassVar[str]
    bits: ClassVar[int] = 4
    BLOCK_SIZES: ClassVar[tuple[int, ...]] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    casts_to_model_dtype: ClassVar[bool] = True  # quantizes the weight as transformers would hold it

    def __post_init__(self):
        if self.block_size not in self.BLOCK_SIZES:
            raise UsageError(
                f"block size is {self.block_size}, expected one of {', '.join(map(str, self.BLOCK_SIZES))}",
                "64 is what transformers and bitsandbytes use.",
            )

    def outputs(self, weight: str, out_features: int, in_features: int, dtype: str) -> list[TensorSpec]:
        """What is stored for the tensor `weight` of safetensors dtype code `dtype`."""
        return bnb_format.outputs_4bit(weight, (out_features, in_features), self.name, self.block_size, self.double_quant, dtype)

    def quantization_config(self, skip_modules: list[str] | None, compute_dtype: str) -> dict[str, object]:
        """The `quantization_config` of config.json."""
        return bnb_format.quantization_config(
            bits=4, skip_modules=skip_modules, compute_dtype=compute_dtype, quant_type=self.name, double_quant=self.double_quant
        )

    def granularity(self, in_features: int) -> int:
        """Elements that a chunk must be a multiple of: no block may straddle two chunks."""
        return self.block_size

    def working_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a stream holds until it is finished: per block absmax, two sums, and the float64 of its mean."""
        return 24 * -(-out_features * in_features // self.block_size)

    def stream(self, weight: str, out_features: int, in_features: int, dtype: str, device: torch.device) -> "_Stream":
        """Takes the weight chunk by chunk, in any order."""
        return _Stream(self, weight, (out_features, in_features), dtype, device)


class _Stream:
    def __init__(self, method: Blockwise4bit, weight: str, shape: tuple[int, int], dtype: str, device: torch.device):
        self.method, self.weight, self.shape, self.dtype = method, weight, shape, dtype
        self.code = torch.from_numpy(codebooks.CODEBOOKS[method.name].copy()).to(device)
        # Filled in place: small tensors kept one by one would pin the heap between the large ones that come and go.
        blocks = -(-shape[0] * shape[1] // method.block_size)
        self.absmax = torch.empty(blocks, device=device)
        sums = blocks if method.double_quant else 0
        # The stored absmax is known only at the end: what its change will add to the error follows from two sums a block.
        # bfloat16 is enough for a term of second order, and a huge tensor has many blocks.
        self.slope = torch.empty(sums, dtype=torch.bfloat16, device=device)
        self.curve = torch.empty(sums, dtype=torch.bfloat16, device=device)
        self.sums: dict[int, list[float]] = {}
        self.nested_offset: float | None = None

    def feed(self, chunk: torch.Tensor, start: int) -> list[tuple[str, int, torch.Tensor]]:
        """Quantizes a chunk of whole blocks, flat or in rows, that begins at element `start` of the weight. Returns
        (name, byte offset, tensor) pieces of the outputs. Threads may feed different chunks at the same time."""
        block_size, name = self.method.block_size, self.method.name
        packed, absmax = quantize_4bit(chunk, block_size, name)
        sums, slope, curve = error_4bit(chunk, packed, absmax, block_size, name)
        self.sums[start] = sums.tolist()
        place = slice(start // block_size, start // block_size + absmax.numel())
        self.absmax[place] = absmax
        if self.method.double_quant:
            self.slope[place], self.curve[place] = slope, curve
        return [(self.weight, start // 2, packed)]

    def finish(self) -> Result:
        """The rest of the tensors, once every row was fed."""
        absmax, method, self.errors = self.absmax, self.method, add_up(self.sums)
        tensors = {f"{self.weight}.quant_map": self.code}
        if method.double_quant:
            self.nested_offset = mean_absmax(absmax)
            tensors |= self._nest(absmax, self.nested_offset)
        else:
            tensors[f"{self.weight}.absmax"] = absmax
        state = bnb_format.quant_state(method.name, method.block_size, self.dtype, self.shape, self.nested_offset)
        blob = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        tensors[f"{self.weight}.quant_state.bitsandbytes__{method.name}"] = blob
        return Result(tensors, self.errors)

    def _nest(self, absmax: torch.Tensor, offset: float) -> dict[str, torch.Tensor]:
        codes, nested_absmax = [], []
        slopes, curves = self.slope.split(_NESTED_PIECE), self.curve.split(_NESTED_PIECE)
        for piece, slope, curve in zip(absmax.split(_NESTED_PIECE), slopes, curves):
            code, nested = quantize_absmax(piece, offset)
            change = (dequantize_absmax(code, nested, offset) - piece).double()
            added = change * (change * curve.double() - 2 * slope.double())
            self.errors.squared_error += float(torch.nan_to_num(added, nan=0.0, posinf=0.0, neginf=0.0).sum())
            codes.append(code)
            nested_absmax.append(nested)
        return {
            f"{self.weight}.absmax": torch.cat(codes),
            f"{self.weight}.nested_absmax": torch.cat(nested_absmax),
            f"{self.weight}.nested_quant_map": torch.from_numpy(codebooks.DYNAMIC_MAP.copy()),
        }
