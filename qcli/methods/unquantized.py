"""The weights as they are: what every other method is compared with."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from qcli.methods._method import Method, Parts
from qcli.methods.errors import ErrorSums
from qcli.schemes import UNQUANTIZED, Scheme


@dataclass(frozen=True)
class Unquantized:
    """Rounds nothing."""

    casts_to_model_dtype: ClassVar[bool] = False
    needs_absmax: ClassVar[bool] = False

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        return UNQUANTIZED

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method, which has no options."""
        return cls()

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> "_Encoder":
        """Takes one weight of this shape."""
        return _Encoder()

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features]."""
        return parts["weight"].view(out_features, in_features).float()


class _Encoder:
    """Hands every chunk back."""

    grain = 1

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        return {"weight": chunk}

    def finish(self) -> tuple[Parts, ErrorSums]:
        return {}, ErrorSums()


METHOD: type[Method] = Unquantized
