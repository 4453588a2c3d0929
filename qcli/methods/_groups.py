"""What the encoders of groups, rows, blocks and whole weights share: they take whole rows, and note what rounding cost.

A method gives a function that rounds rows. The stored value of an element is
  integers   (code - zero_point) * scale, a product in the dtype of the scale (compressed-tensors)
  E4M3       code * scale, likewise
  NF3        table[code] * scale, in float32
  E2M1       code * 2^(scale - 127) under E8M0 scales; code * (scale / global_scale) under E4M3 scales, in float32
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qcli.codebooks import E2M1, NF3
from qcli.methods._method import Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.ops.round_floats import E2M1_MAX, E4M3_MAX
from qcli.runtime.arguments import table
from qcli.schemes import Scheme

_MAKING = threading.Lock()


@dataclass
class Rounded:
    """Rows of a weight [rows, in_features]: codes of that shape, scales [rows, groups] as they are stored, zero points int8 [rows,
    groups] or None, and float64 [3] of what they cost: squared error, squared norm, elements that are NaN or infinite."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    sums: torch.Tensor


class GroupEncoder:
    """See qcli.methods._method.Encoder. `rounds(rows, absmax=absmax)` takes rows in the dtype of the weight. A chunk must be a
    multiple of `rows` rows."""

    def __init__(
        self,
        scheme: Scheme,
        out_features: int,
        in_features: int,
        device: torch.device,
        rounds: Callable[..., Rounded],
        rows: int = 1,
        absmax: float = 0.0,
    ):
        self.scheme, self.in_features, self._rounds = scheme, in_features, rounds
        self.grain = rows * in_features
        self.absmax = absmax
        self.shape = scheme.scale_shape(out_features, in_features)
        self._scale: torch.Tensor | None = None  # made once its dtype is known
        self.zero_point = torch.empty(self.shape, dtype=torch.int8, device=device) if scheme.zero_point else None
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        rows = chunk.view(-1, self.in_features)
        rounded = self._whole_groups(rows)
        if self.shape[0] > 1:
            first = start // self.in_features // (self.scheme.size if self.scheme.share == "block" else 1)
            place = slice(first, first + len(rounded.scale))
            self._scales(rounded.scale)[place] = rounded.scale
            if self.zero_point is not None and rounded.zero_point is not None:
                self.zero_point[place] = rounded.zero_point
        else:
            self._scales(rounded.scale)[:] = rounded.scale  # of the whole weight, the same in every chunk
        self.sums[start] = rounded.sums.tolist()
        return {"codes": rounded.codes}

    def finish(self) -> tuple[Parts, ErrorSums]:
        parts: Parts = {"scale": self._scale} if self._scale is not None else {}
        if self.scheme.scale == "e4m3":
            parts["global_scale"] = whole_scale(self.absmax)
        if self.zero_point is not None:
            parts["zero_point"] = self.zero_point
        return parts, add_up(self.sums)

    def _whole_groups(self, rows: torch.Tensor) -> Rounded:
        """Rows rounded. A last group that is not full is filled up with zeros, whose codes are dropped."""
        rounded = self._rounds(filled_up(self.scheme, rows), absmax=self.absmax)
        if rounded.codes.shape[1] == self.in_features:
            return rounded
        return replace(rounded, codes=rounded.codes[:, : self.in_features].contiguous())

    def _scales(self, like: torch.Tensor) -> torch.Tensor:
        if self._scale is None:  # two threads that make it at a time would each keep their own
            with _MAKING:
                if self._scale is None:
                    self._scale = torch.empty(self.shape, dtype=like.dtype, device=like.device)
        return self._scale


def filled_up(scheme: Scheme, columns: torch.Tensor) -> torch.Tensor:
    """Columns [..., in_features] with zeros behind them where groups of the scheme do not divide them."""
    lacking = -columns.shape[-1] % scheme.size if scheme.share == "group" else 0
    return torch.nn.functional.pad(columns, (0, lacking)) if lacking else columns


def whole_scale(absmax: float) -> torch.Tensor:
    """What NVFP4's E4M3 scales of a weight are multiplied by, float32 [1]: 448 * 6 / absmax, and 1 for a weight of zeros."""
    wide = torch.tensor([absmax])
    return torch.where((wide > 0) & wide.isfinite(), E4M3_MAX * E2M1_MAX / wide, 1.0)


def cost_of(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """float64 [3]: squared error and squared norm of rows and their stored values, and the elements of rows that are NaN or
    infinite. These, and what they spoil, are in neither sum."""
    wide, values = rows.float(), values.float()
    finite = wide.isfinite() & values.isfinite()
    error = (wide - values).masked_fill_(~finite, 0.0).square_().sum(dtype=torch.float64)
    norm = wide.masked_fill(~finite, 0.0).square_().sum(dtype=torch.float64)
    return torch.stack((error, norm, (~wide.isfinite()).sum().double()))


def values_of(
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values [rows, in_features] that codes of this shape stand for. scale and zero_point have the rows and columns of
    `Scheme.scale_shape`."""
    if scheme.scale == "e8m0":
        scale = torch.exp2(scale.float() - 127)
    elif global_scale is not None:
        scale = scale.float() / global_scale
    if scheme.codebook == "nf3":
        return table(NF3, codes.device)[codes.int()] * spread(scale.float(), scheme, codes)
    if scheme.codebook == "e2m1":
        return table(E2M1, codes.device)[codes.int()] * spread(scale, scheme, codes)
    if zero_point is not None:
        codes = codes.to(torch.int16) - spread(zero_point, scheme, codes)
    return codes.to(scale.dtype) * spread(scale, scheme, codes)


def spread(scale: torch.Tensor, scheme: Scheme, codes: torch.Tensor) -> torch.Tensor:
    """Scales as they meet the codes [rows, in_features]: repeated over groups and blocks, else of a shape that broadcasts."""
    if scheme.share not in ("group", "block"):
        return scale.view(-1, 1)
    wide = scale.repeat_interleave(scheme.size, 1)[:, : codes.shape[1]]
    return wide.repeat_interleave(scheme.size, 0)[: len(codes)] if scheme.share == "block" else wide


def decode_groups(scheme: Scheme, parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
    """The weight float32 [out_features, in_features] that all parts together stand for."""
    shape = scheme.scale_shape(out_features, in_features)
    zero_point = parts["zero_point"].view(shape) if "zero_point" in parts else None
    codes = parts["codes"].view(out_features, in_features)
    return values_of(scheme, codes, parts["scale"].view(shape), zero_point, parts.get("global_scale")).float()
