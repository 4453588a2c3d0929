"""LLM.int8() (arXiv:2208.07339): row-wise int8 weights; outlier columns of the activations multiply in 16 bits.

What is stored is one int8 per element and one float32 absmax per row. The threshold acts when the model runs. Rows are quantized
in float32 from the stored dtype, so nothing passes through float16 on the way.

The paper multiplies outlier columns with the 16-bit weight. bitsandbytes keeps no such weight, and multiplies with the int8 column,
dequantized to the dtype of the activations. So does qcli without calibration. `llm-int8-paper` is the paper's form, for comparison.
With an `outlier_share` texts choose columns once (qcli/calibration/outlier_columns.py), or a report of inspect-outliers names them
(qcli/calibration/reported_columns.py), and these columns of the weight are stored in 16 bits beside the codes. The codes stay those
of the whole weight, for readers that know no such columns: a scale that left them out would clip them there, and ruin the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Needs
from qcli.methods._method import Encoder, Method, Parts
from qcli.schemes import NAMED, OUTLIER_SHARE, PAPER_THRESHOLD, Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LLMInt8:
    """`threshold`: activations of this magnitude and more are outliers (section 3.2 of the paper); 0 turns them off.
    `outlier_share`: the largest share of the columns that texts choose to be kept in 16 bits. `outliers`: the path of a report of
    `qcli inspect-outliers --json`, which names them instead."""

    threshold: float = PAPER_THRESHOLD
    form: str = "llm-int8"
    outlier_share: float = 0.0
    outliers: str = ""

    casts_to_model_dtype: ClassVar[bool] = False
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise UsageError(f"threshold is {self.threshold}, expected a number of 0 or more", "6.0 is the paper's value.")
        if not 0 <= self.outlier_share <= 0.5:
            raise UsageError(
                f"outlier_share is {self.outlier_share}, expected a share of the columns from 0 to 0.5",
                f"{OUTLIER_SHARE} is what --calibrate takes.",
            )

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return replace(NAMED[self.form], threshold=float(self.threshold), outlier_share=float(self.outlier_share))

    @property
    def needs(self) -> Needs:
        """What it must know of the inputs of a module."""
        return "tokens" if self.outlier_share and not self.outliers else "nothing"

    def by_texts(self) -> Self:
        """The same method with all that calibration gives it."""
        return replace(self, outlier_share=OUTLIER_SHARE)

    def without_texts(self) -> Self:
        """The same method by the weights alone."""
        return replace(self, outlier_share=0.0)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.threshold, scheme.name, scheme.outlier_share)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._int8 import RowEncoder

        return RowEncoder(out_features, in_features, device)

    def encoder_with(
        self, columns: tuple[int, ...], out_features: int, in_features: int, device: torch.device, dtype: str
    ) -> Encoder:
        """Takes one weight of this shape, in the dtype of this code, of which `columns`, ascending, stay in 16 bits."""
        from qcli.methods._int8 import ColumnsEncoder

        stored = self.scheme.parts(out_features, in_features, dtype)["outlier_weight"].dtype
        return ColumnsEncoder(out_features, in_features, device, columns, stored)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._int8 import decode_rows

        return decode_rows(parts, out_features, in_features)


METHOD: type[Method] = LLMInt8
