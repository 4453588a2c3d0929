"""The options of the 4-bit methods nf4 and fp4. What carries them out is in qcli/methods/_blockwise.py, which loads torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Scaled
from qcli.methods._method import Encoder, Parts, check_search
from qcli.schemes import BLOCK_SIZES, NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid


@dataclass(frozen=True)
class Blockwise4bit(Scaled):
    """Options of the 4-bit methods: elements per absmax, whether the absmax values are quantized too, and how they are found. With
    search "mse" each is the scale that makes the squared error of its block least, and no longer the absmax. With "imatrix" texts
    weight the error. Readers see no difference, but the bytes are not those of bitsandbytes' own quantizer."""

    block_size: int = 64
    double_quant: bool = True
    search: str = "none"

    codebook: ClassVar[str]
    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"block size is {self.block_size}, expected one of {', '.join(map(str, BLOCK_SIZES))}",
                "64 is what transformers and bitsandbytes use.",
            )
        check_search(self.search)
        self.check_rounding()

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        named = NAMED[self.codebook if self.double_quant else f"{self.codebook}-plain"]
        return replace(named, size=self.block_size)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.size, scheme.double_quant)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._blockwise import BlockEncoder

        return BlockEncoder(self.scheme, out_features * in_features, device, self.search)

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._blockwise import decode_blocks

        return decode_blocks(parts, self.block_size, self.codebook, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        import torch

        from qcli.methods._grid import block_grid
        from qcli.ops.fit_scale import fit_scale
        from qcli.ops.quantize_4bit import quantize_4bit

        if self.search == "none":
            _, scale = quantize_4bit(weight, self.block_size, self.codebook)
        else:
            weights = importance if self.search == "imatrix" else None
            scale, _ = fit_scale(weight, self.block_size, self.codebook, 4, False, torch.float32, weights)
        return block_grid(self.scheme, scale, *weight.shape)
