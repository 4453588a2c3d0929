"""HQQ: zero points that make the error robust to outliers, without any texts (half-quadratic quantization, Badri and Shaji 2023,
https://mobiusml.github.io/hqq_blog/).

Codes lie in [0, 2^b - 1] while the zero point z is sought. With s = (2^b - 1) / (max - min) of a group, up to 20 times:
  q = clamp(round(w s + z)),  r = (q - z) / s,  e = shrink(w - r),  z = mean(q - (w - e) s) of the group
where shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0) with p = 0.7 and beta = 10. That is the l_p norm of the error, which
a few large errors do not rule. It ends once the mean error no longer falls.

hqq keeps z as a float. Formats that others read hold integers: here z is rounded at the end, the scale to the model's dtype, and
codes are found anew. A weight is taken in pieces of half a million elements, of which each ends by its own mean error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from qcli.errors import UsageError
from qcli.methods._calibrated import Scaled
from qcli.methods._method import Encoder, Method, Parts
from qcli.methods.rtn import check_integers, integers, range_of
from qcli.schemes import NAMED, WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid
    from qcli.methods._groups import Rounded

_PIECE = 1 << 19
_NORM, _BETA = 0.7, 10.0
_UNMOVED = 0.16  # errors below it shrink to exactly 0: |x| is less than |x|^(p-1) / beta up to 0.170
_LARGEST_INVERSE = 2e4  # of a scale; hqq's own, which float16 needs
_SMALLEST_RANGE = 1e-4  # of a group that has a scale of its own


@dataclass(frozen=True)
class Hqq(Scaled):
    """`bits` of a code, `group_size` elements of a row that share a scale (-1: the row), and how often zero points are improved."""

    bits: int = 4
    group_size: int = 64
    iterations: int = 20

    casts_to_model_dtype: ClassVar[bool] = True
    needs_absmax: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integers(self.bits, self.group_size)
        self.check_rounding()
        if not 0 <= self.iterations <= 1000:
            raise UsageError(f"iterations is {self.iterations}, expected 0 to 1000", "20 is hqq's own number.")

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as with these options."""
        return integers(NAMED["hqq"], self.bits, self.group_size, zero_point=True)

    @classmethod
    def of(cls, scheme: Scheme) -> Self:
        """The method with the options that make `scheme`."""
        return cls(scheme.bits, scheme.size or WHOLE_ROW)

    def encoder(self, out_features: int, in_features: int, device: torch.device, absmax: float = 0.0) -> Encoder:
        """Takes one weight of this shape."""
        from qcli.methods._groups import GroupEncoder

        rows = max(1, _PIECE // in_features)
        return GroupEncoder(self.scheme, out_features, in_features, device, self._rounds, min(rows, out_features))

    def decode(self, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that all parts together stand for."""
        from qcli.methods._groups import decode_groups

        return decode_groups(self.scheme, parts, out_features, in_features)

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """See Calibratable."""
        from qcli.methods._grid import group_grid
        from qcli.methods._groups import filled_up

        rounded = self._rounds(filled_up(self.scheme, weight), absmax)
        return group_grid(self.scheme, rounded, weight.shape[1], None, weight.dtype)

    def _rounds(self, rows: torch.Tensor, absmax: float) -> Rounded:
        import torch

        from qcli.methods._groups import Rounded
        from qcli.ops.round_integers import round_integers

        size = rows.shape[1] if self.group_size == WHOLE_ROW else self.group_size
        least, most = range_of(self.bits)
        scales, zeros = [], []
        for piece in rows.split(max(1, _PIECE // rows.shape[1])):
            inverse, zero = optimize(piece.unflatten(-1, (-1, size)), self.bits, self.iterations)
            scales.append((1 / inverse).squeeze(-1).to(rows.dtype))
            zeros.append((zero.squeeze(-1).round() + least).clamp_(least, most).nan_to_num_(0.0).to(torch.int8))
        return Rounded(*round_integers(rows, size, least, most, True, torch.cat(scales), torch.cat(zeros)))


def optimize(groups: torch.Tensor, bits: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / scale and zero float32 [..., 1] of groups [..., size], float32, bfloat16 or float16, as hqq 0.2 finds them."""
    import torch

    from qcli.ops.hqq_terms import hqq_terms

    most = float(2**bits - 1)
    low, high = groups.amin(-1, keepdim=True).float(), groups.amax(-1, keepdim=True).float()
    span = high - low
    inverse = torch.where(span.abs() <= _SMALLEST_RANGE, 1.0, most / span).clamp_(max=_LARGEST_INVERSE)
    zero = -low * inverse
    if bits == 4:
        zero = zero.round_()
    least_error = float("inf")
    for _ in range(iterations):
        terms, magnitudes, largest = hqq_terms(groups, inverse, zero, bits)
        if not (largest < _UNMOVED).all():
            terms, magnitudes = _moved(groups.float(), inverse, zero, bits)
        zero, mean = terms.mean(-1, keepdim=True), float(magnitudes.mean())
        if not mean < least_error:
            break
        least_error = mean
    return inverse, zero


def levels(groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes float32 [..., size] of groups float32 of that shape."""
    return (groups * inverse + zero).round_().clamp_(0, 2**bits - 1)


def _moved(groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of the zero points and the magnitudes of the errors, where some errors are shrunk."""
    import torch

    codes = levels(groups, inverse, zero, bits)
    error = groups - (codes - zero) / inverse
    magnitudes = error.abs()
    shrunk = error.sign() * torch.nn.functional.relu(magnitudes - magnitudes.pow(_NORM - 1) / _BETA)
    return codes - (groups - shrunk) * inverse, magnitudes


METHOD: type[Method] = Hqq
