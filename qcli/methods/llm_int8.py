"""LLM.int8() (arXiv:2208.07339): row-wise int8 weights; outlier columns of the activations multiply in 16 bits.

What is stored is the weight alone: one int8 per element and one float32 absmax per row. The threshold acts when the model runs.
Rows are quantized in float32 from the stored dtype, so nothing passes through float16 on the way.

The paper multiplies outlier columns with the 16-bit weight. bitsandbytes and qcli keep no such weight, and multiply with the int8
column, dequantized to the dtype of the activations. `llm-int8-paper` is the paper's form, for comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import NAMED, PAPER_THRESHOLD, Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LLMInt8:
    """`threshold`: activations of this magnitude and more are outliers (section 3.2 of the paper); 0 turns them off."""

    threshold: float = PAPER_THRESHOLD
    form: str = "llm-int8"

    casts_to_model_dtype: ClassVar[bool] = False
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise UsageError(f"threshold is {self.threshold}, expected a number of 0 or more", "6.0 is the paper's value.")

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return replace(NAMED[self.form], threshold=float(self.threshold))

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.threshold, scheme.name)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._int8 import RowEncoder

        return RowEncoder(out_features, in_features, device)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._int8 import decode_rows

        return decode_rows(parts, out_features, in_features)


METHOD: type[Method] = LLMInt8
