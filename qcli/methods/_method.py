"""The protocols of quantization: what a method is, and the encoder that it makes.

A method is a frozen dataclass whose fields are its options. It names a scheme (qcli/schemes.py) and makes an encoder for each
weight. The encoder turns chunks into parts by role: `codes`, `scale`, `zero_point`, `nested_scale`, `nested_offset`. A format
(qcli/formats/) gives the parts names and bytes. So no method knows a format, and no format knows how codes were found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qcli.errors import UsageError
from qcli.methods.errors import ErrorSums
from qcli.schemes import SEARCHES, Scheme

if TYPE_CHECKING:
    import torch

Parts = dict[str, "torch.Tensor"]
"""Role to tensor. `codes` of 4 bits in flat blocks are uint8, two a byte, the first in the high nibble. Other codes stand alone,
[rows, in_features]: int8, float8_e4m3fn, or uint8 for the codes of E2M1. `scale` is of the dtype that the scheme says, and 8-bit
codes under double quantization; `nested_scale` and `global_scale` are float32, `zero_point` is an integer, `nested_offset` float64
[]."""


def check_search(search: str) -> None:
    """Raises UsageError for an option `search` that there is not."""
    if search not in SEARCHES:
        raise UsageError(f"search is {search!r}, expected {', '.join(SEARCHES[:-1])} or {SEARCHES[-1]}")


class Encoder(Protocol):
    """One weight [out_features, in_features] on its way into codes, chunk by chunk."""

    grain: int
    """Elements that a chunk must be a multiple of, unless it is the last."""

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        """The parts of a chunk, flat or in rows, that begins at element `start` of the weight taken row by row. Several threads
        may feed different chunks at the same time, in any order. What is not known before the end is left out."""
        ...

    def finish(self) -> tuple[Parts, ErrorSums]:
        """The parts that are known only once every chunk was fed, and what quantizing cost."""
        ...


class Method(Protocol):
    """A way to quantize a weight. A frozen dataclass; its fields are its options, checked when it is made."""

    @property
    def casts_to_model_dtype(self) -> bool:
        """Whether weights enter in the model's dtype, as transformers would hold them; else as they are stored."""
        ...

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        ...

    @classmethod
    def of(cls, scheme: Scheme) -> Method:
        """The method with the options that make `scheme`."""
        ...

    @property
    def needs_absmax(self) -> bool:
        """Whether a scale is made of the absmax of a whole weight, which is known only once the weight was read."""
        ...

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape. `absmax` is that of the whole weight, or of all weights that readers fuse with it, for a
        method that needs it."""
        ...

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        ...
