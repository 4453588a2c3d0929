"""LLM.int8() (arXiv:2208.07339): row-wise int8 weights; outlier columns of the activations multiply in 16 bits.

What is stored is the weight alone: one int8 per element and one float32 absmax per row (`SCB`). The threshold acts when the
model runs. Rows are quantized in float32 from the stored dtype, so nothing passes through float16 on the way.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from qcli.checkpoint.dtypes import TensorSpec
from qcli.errors import UsageError
from qcli.formats import bitsandbytes as bnb_format
from qcli.methods._base import Result, add_up
from qcli.ops.error_int8 import error_int8
from qcli.ops.quantize_int8 import quantize_int8


@dataclass(frozen=True)
class LLMInt8:
    """`threshold`: activations of this magnitude and more are outliers (section 3.2 of the paper); 0 turns them off."""

    threshold: float = 6.0

    name: ClassVar[str] = "llm-int8"
    bits: ClassVar[int] = 8
    casts_to_model_dtype: ClassVar[bool] = False

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise UsageError(f"threshold is {self.threshold}, expected a number of 0 or more", "6.0 is the paper's value.")

    def outputs(self, weight: str, out_features: int, in_features: int, dtype: str) -> list[TensorSpec]:
        """What is stored for the tensor `weight`."""
        return bnb_format.outputs_8bit(weight, (out_features, in_features))

    def quantization_config(self, skip_modules: list[str] | None, compute_dtype: str) -> dict[str, object]:
        """The `quantization_config` of config.json."""
        return bnb_format.quantization_config(
            bits=8, skip_modules=skip_modules, compute_dtype=compute_dtype, threshold=float(self.threshold)
        )

    def granularity(self, in_features: int) -> int:
        """Elements that a chunk must be a multiple of: whole rows."""
        return in_features

    def working_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a stream holds until it is finished: one float32 per row, twice."""
        return 8 * out_features

    def stream(self, weight: str, out_features: int, in_features: int, dtype: str, device: torch.device) -> "_Stream":
        """Takes the weight chunk by chunk, in any order."""
        return _Stream(weight, out_features, in_features, device)


class _Stream:
    def __init__(self, weight: str, out_features: int, in_features: int, device: torch.device):
        self.weight, self.in_features = weight, in_features
        self.absmax = torch.empty(out_features, device=device)
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> list[tuple[str, int, torch.Tensor]]:
        """Quantizes a chunk of whole rows that begins at element `start` of the weight. Returns (name, byte offset, tensor)
        pieces of the outputs. Threads may feed different chunks at the same time."""
        chunk = chunk.view(-1, self.in_features)
        codes, absmax, _ = quantize_int8(chunk, 0.0)
        self.sums[start] = error_int8(chunk, codes, absmax).tolist()
        row = start // self.in_features
        self.absmax[row : row + absmax.numel()] = absmax
        return [(self.weight, start, codes)]

    def finish(self) -> Result:
        """The rest of the tensors, once every row was fed."""
        module = self.weight.removesuffix("weight")
        weight_format = torch.zeros((), dtype=torch.uint8)
        return Result({f"{module}SCB": self.absmax, f"{module}weight_format": weight_format}, add_up(self.sums))


METHOD = LLMInt8
