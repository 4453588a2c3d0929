"""Statistics of one weight and of one norm gain, taken piece by piece from the bytes of a checkpoint."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from qcli import methods
from qcli.checkpoint import dtypes
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.names import place
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import PIECE_BYTES
from qcli.methods.errors import ErrorSums
from qcli.outliers.statistics import ChannelStats
from qcli.outliers.weights.inspection import Beyond, DimZ, LinearFinding, NormFinding
from qcli.outliers.weights.largest import LargestWeights
from qcli.schemes import NAMED

METHODS = ("llm-int8", "nf4")  # of qcli.schemes, whose SQNR is measured
GAIN_SIGMAS = 3.0  # BERT Busters (arXiv:2105.06990)
COLUMN_SIGMAS = 4.0  # bitsandbytes' find_outlier_dims
_IN_CACHE = 1 << 16  # elements whose float64 copy stays in a CPU's cache


class LinearWeight:
    """A linear weight [out_features, in_features] in its logical order. After its last piece it has a `finding`, and `errors`, the
    error sums of each of METHODS.

    Memory until then: a piece, and 8 bytes for every 64 elements, 16 at the end. A weight stored transposed (Conv1D) is held whole.
    """

    finding: LinearFinding
    errors: dict[str, ErrorSums]

    def __init__(self, info: TensorInfo, linear: Linear, dtype: str, *, quantized: bool, early_down: bool):
        """`dtype` is the safetensors code of the model's dtype. With `early_down` single weights that stand out are looked for."""
        self.info, self.linear = info, linear
        self._dtype, self._quantized, self._early_down = dtype, quantized, early_down

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(start, count) in bytes of the tensor: whole rows that are also whole blocks of 64."""
        rows, columns = self.info.shape
        row = columns * dtypes.ITEMSIZE[self.info.dtype]
        grain = 64 // math.gcd(columns, 64)
        step = max(PIECE_BYTES // (row * grain), 1) * grain * row
        for start in range(0, rows * row, step):
            yield start, min(step, rows * row - start)

    def take(self, start: int, data: bytes) -> None:
        """Takes the bytes from `start` on. Pieces come in order."""
        stored = torch.frombuffer(bytearray(data), dtype=dtypes.torch_dtype(self.info.dtype))
        if not start:
            self._begin()
        last = start + len(data) == self.info.nbytes
        if not self.linear.transposed:
            self._add(stored.view(-1, self.linear.in_features))
        else:
            first = start // stored.itemsize
            self._whole[first : first + stored.numel()] = stored
            if last:
                self._add_whole()
        if last:
            self._finish()

    def _begin(self) -> None:
        """Allocates at the first piece only, since many weights wait."""
        linear, info = self.linear, self.info
        self._row = 0
        self._stats = ChannelStats(linear.in_features)
        # Filled in place: many small tensors would keep the heap from shrinking between the pieces.
        self._row_squares = torch.empty(linear.out_features, dtype=torch.float64)
        self._largest = LargestWeights(linear.in_features) if self._early_down else None
        self._encoders = {}
        for name in METHODS:
            method = methods.make(NAMED[name])
            enters_as = methods.entering_dtype(method, info.dtype, self._dtype)
            encoder = method.encoder(linear.out_features, linear.in_features, torch.device("cpu"))
            self._encoders[name] = encoder, dtypes.torch_dtype(enters_as)
        if linear.transposed:
            self._whole = torch.empty(info.numel, dtype=dtypes.torch_dtype(info.dtype))

    def _add(self, rows: torch.Tensor) -> None:
        for encoder, dtype in self._encoders.values():
            encoder.feed(rows.to(dtype).view(-1), self._row * self.linear.in_features)
        if rows.dtype == torch.float64 or rows.dtype.itemsize == 1:  # float8: no sums are made in it
            rows = rows.float()
        self._stats.add(rows, torch.inf)
        squares = self._row_squares[self._row : self._row + len(rows)]
        few = max(_IN_CACHE // self.linear.in_features, 1)
        for some, sums in zip(rows.split(few), squares.split(few)):
            torch.sum(some.double().square_(), 1, out=sums)
        if self._largest:
            self._largest.add(rows, self._row)
        self._row += len(rows)

    def _add_whole(self) -> None:
        logical = self._whole.view(self.linear.in_features, self.linear.out_features).t()
        step = 64 * max(PIECE_BYTES // (64 * self.linear.in_features * self._whole.itemsize), 1)
        for rows in logical.split(step):
            self._add(rows.contiguous())
        del self._whole

    def _finish(self) -> None:
        errors = self.errors = {name: encoder.finish()[1] for name, (encoder, _) in self._encoders.items()}
        row_absmax, block_absmax = (self._encoders[name][0].absmax for name in METHODS)
        moments = self._stats.pooled_moments()
        rms, absmax = number(moments.rms), number(self._stats.absmax.max())
        finite = not self._stats.nonfinite
        row_rms = (self._row_squares / self.linear.in_features).sqrt()
        crests = row_absmax.double()[row_rms > 0] / row_rms[row_rms > 0]
        at = place(self.linear.module)
        self.finding = LinearFinding(
            layer=at.layer,
            module=self.linear.module,
            tensor=self.info.name,
            kind=at.kind,
            out_features=self.linear.out_features,
            in_features=self.linear.in_features,
            dtype=dtypes.TORCH_NAMES[self.info.dtype],
            quantized=self._quantized,
            nonfinite=errors["llm-int8"].nonfinite,
            absmax=absmax if finite else None,
            rms=rms if finite else None,
            crest=absmax / rms if finite and rms else None,
            kurtosis=number(moments.kurtosis) if finite else None,
            row_spread=spread(row_absmax) if finite else None,
            row_crest=number(crests.max()) if finite and len(crests) else None,
            block_spread=spread(block_absmax) if finite else None,
            columns=self._columns() if finite else None,
            largest=self._largest.found(rms) if finite and self._largest else None,
            sqnr={name: sums.sqnr if finite else None for name, sums in errors.items()},
        )
        del self._encoders, self._stats, self._row_squares, self._largest

    def _columns(self) -> Beyond:
        """Columns whose standard deviation stands out among those of all columns."""
        # Over n instead of n - 1 rows: a factor that all columns share.
        return Beyond(**beyond(z_scores(self._stats.channel_moments().std, correction=1), COLUMN_SIGMAS))


class NormGain:
    """The gain of a norm: a 1-D tensor, read at once. Then it has a `finding`."""

    finding: NormFinding

    def __init__(self, info: TensorInfo, module: str):
        self.info, self.module = info, module

    def pieces(self) -> Iterator[tuple[int, int]]:
        """The whole tensor: (start, count) in bytes."""
        yield 0, self.info.nbytes

    def take(self, start: int, data: bytes) -> None:
        """Takes the whole tensor."""
        gain = torch.frombuffer(bytearray(data), dtype=dtypes.torch_dtype(self.info.dtype)).double()
        at, nonfinite = place(self.module), int((~gain.isfinite()).sum())
        whole = not nonfinite
        z = z_scores(gain, correction=0).abs() if whole else gain[:0]
        self.finding = NormFinding(
            layer=at.layer,
            module=self.module,
            tensor=self.info.name,
            kind=at.kind,
            channels=len(gain),
            dtype=dtypes.TORCH_NAMES[self.info.dtype],
            nonfinite=nonfinite,
            mean=number(gain.mean()) if whole else None,
            std=number(gain.std(correction=0)) if whole else None,
            **beyond(z, GAIN_SIGMAS),
        )


def z_scores(x: torch.Tensor, correction: int) -> torch.Tensor:
    """(x - mean) / standard deviation; zeros where x does not vary."""
    std = x.std(correction=correction) if len(x) > correction else torch.zeros(())
    # Equal values differ by rounding alone, which is no deviation.
    return (x - x.mean()) / std if std > 1e-12 * x.abs().max() else torch.zeros_like(x)


def beyond(z: torch.Tensor, sigmas: float) -> dict[str, object]:
    """The fields of Beyond for z [dims]."""
    far = (z > sigmas).nonzero().view(-1)
    order = far[z[far].argsort(descending=True, stable=True)]
    dims = [DimZ(int(dim), float(z[dim])) for dim in order]
    return {"beyond": len(far), "max_z": number(z.max()) if len(z) else None, "dims": dims}


def spread(absmax: torch.Tensor) -> float | None:
    """Greatest over median absmax; None where the median is zero."""
    middle = np.median(absmax.double().numpy())
    return number(absmax.max().double() / middle) if middle > 0 else None


def number(x: float | torch.Tensor) -> float | None:
    """A finite Python float, else None."""
    value = float(x)
    return value if math.isfinite(value) else None
