"""The scale of each block that makes the squared rounding error least, found by a search around the scale of round to nearest.

Integers of b bits have codes in [-2^(b-1), 2^(b-1) - 1], and (code - zero_point) * scale is the value of a code. A codebook has the
value table[code] * scale. The search begins with the scale of round to nearest, the factor 1:
  symmetric    start = max|w| / ((2^b - 1) / 2)
  zero point   start = (max - min) / (2^b - 1) of a range that holds 0; zero_point = round(-2^(b-1) - factor * min / scale)
  codebook     start = max|w|
Each candidate is start * factor, rounded to the dtype in which it will be stored. A code is the one nearest to w * (1 / scale), and
the error of the candidate is the sum of (w - value)^2. First come the factor 1 and a coarse grid of factors, then a fine grid
around the best of them. Last the least squares scale of the best codes, sum(w c) / sum(c^2), replaces the scale if its error is
less, twice. A candidate must be better than all earlier ones, so no result is worse than the factor 1.

With symmetric integers a scale may be negative. There is one more code below zero than above it, and such a scale gives it to the
elements above zero.

With `weights`, one of each column, every squared error is multiplied by its column's weight, and so are the products of the least
squares scale. Weights are the mean squares of activations, or any other measure of what an error costs there.

A block keeps the factor 1 where its max|w| is not in [2^-50, 2^50], where its scale is 0 or infinite in `dtype`, and where an
element is NaN or infinite. An integer scale of 0 becomes the eps of `dtype`.

All sums have 16 float32 lanes. Lane i adds the elements i, i + 16, ... in order, and the lanes are added in halves. Every variant
therefore finds the same bits.
"""

from functools import cache

import numpy as np
import torch

from qcli import codebooks
from qcli.ops._library import blocks, define
from qcli.runtime import cpu

_LANES = 16
_LEAST, _MOST = 2.0**-50, 2.0**50
_REFITS = 2

# The coarse factors of each number of bits, or of each codebook, as (lowest, highest).
_RANGES: dict[int | str, tuple[float, float]] = {
    2: (0.2, 1.5),
    3: (0.25, 1.25),
    4: (0.35, 1.2),
    5: (0.5, 1.15),
    6: (0.65, 1.12),
    7: (0.85, 1.1),
    8: (0.95, 1.1),
    "nf4": (0.35, 1.5),
    "fp4": (0.3, 1.6),
    "nf3": (0.3, 1.4),
}
_CODEBOOKS = ("nf4", "fp4", "nf3")


@cache
def _factors(codebook: str, bits: int, zero_point: bool) -> tuple[np.ndarray, np.ndarray]:
    """The coarse factors float32 [16] or [32], of which the first is 1, and the fine ones [16], relative to the best coarse one.

    Both are geometric. The fine ones are between the neighbours of a coarse one.
    """
    lowest, highest = _RANGES[codebook or bits]
    steps = _LANES - 2
    coarse = np.append(1.0, lowest * (highest / lowest) ** (np.arange(_LANES - 1) / steps))
    if not codebook and not zero_point:
        coarse = np.append(coarse, -np.append(coarse[1:], 1.0))
    places = np.delete(np.arange(-8, 9), 8) / 9
    return coarse.astype(np.float32), ((highest / lowest) ** (places / steps)).astype(np.float32)


@cache
def ranked(codebook: str) -> tuple[np.ndarray, np.ndarray]:
    """The 15 thresholds of a codebook, and its 16 values in their order. Of NF3, the last value is repeated, above thresholds that
    nothing passes."""
    if codebook == "nf3":
        return codebooks.NF3_OF_SIXTEEN
    return codebooks.THRESHOLDS[codebook], codebooks.CODEBOOKS[codebook][codebooks.ORDER[codebook]]


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sums of x [blocks, 16 n] in the order of the kernel."""
    lanes, *rest = x.unflatten(1, (-1, _LANES)).unbind(1)
    for part in rest:
        lanes = lanes + part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


class _Search:
    """The search in all blocks w [blocks, 16 n] at once. `best` holds (error, scale, zero_point, factor), each [blocks]."""

    def __init__(
        self, w: torch.Tensor, codebook: str, bits: int, zero_point: bool, dtype: torch.dtype, weights: torch.Tensor | None = None
    ):
        self.w, self.codebook, self.bits, self.zero_point, self.dtype = w, codebook, bits, zero_point, dtype
        self.weights = weights  # [blocks, 16 n]
        self.least, self.most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        largest = w.abs().amax(1)
        if codebook:
            self.start = largest
        elif zero_point:
            self.start = (high - self.low) / (self.most - self.least)
        else:
            self.start = largest / ((self.most - self.least) / 2)
        first = self._stored(self.start)
        self.searched = (largest >= _LEAST) & (largest <= _MOST) & (first != 0) & first.isfinite()
        if not codebook:
            first = torch.where(first == 0, torch.finfo(dtype).eps, first)
        first = torch.where(first.isnan(), torch.nan, first)
        one = torch.ones_like(first)
        self.best = [torch.full_like(first, torch.inf), first, self._zero(first, one), one]

    def run(self) -> None:
        coarse, fine = _factors(self.codebook, self.bits, self.zero_point)
        for factor in coarse.tolist():
            self._factor(torch.full_like(self.start, factor))
        around = self.best[3]
        for factor in fine.tolist():
            self._factor(around * factor)
        for _ in range(_REFITS):
            scale, zero = self.best[1], self.best[2]
            c = self._nearest(scale, zero)
            self._consider(self._stored(self._sum(self.w * c) / self._sum(c * c)), zero, self.best[3])

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return _sum(x if self.weights is None else x * self.weights)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.to(self.dtype).float()

    def _zero(self, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        if not self.zero_point:
            return torch.zeros_like(scale)
        return (self.least - (self.low * factor) / scale).clamp_(self.least, self.most).round_().nan_to_num_(0.0)

    def _factor(self, factor: torch.Tensor) -> None:
        scale = self._stored(self.start * factor)
        self._consider(scale, self._zero(scale, factor), factor)

    def _nearest(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What a code stands for, in units of the scale."""
        v = self.w * (1.0 / scale).unsqueeze(1)
        if not self.codebook:
            return v.clamp_((self.least - zero).unsqueeze(1), (self.most - zero).unsqueeze(1)).round_()
        thresholds, values = (torch.from_numpy(t).to(v.device) for t in ranked(self.codebook))
        return values[torch.bucketize(v, thresholds)]

    def _consider(self, scale: torch.Tensor, zero: torch.Tensor, factor: torch.Tensor) -> None:
        error = self._sum((self.w - self._nearest(scale, zero) * scale.unsqueeze(1)).square_())
        better = self.searched & (scale != 0) & scale.isfinite() & (error < self.best[0])
        self.best = [torch.where(better, new, old) for new, old in zip((error, scale, zero, factor), self.best)]


def _check(size: int, codebook: str, bits: int, dtype: torch.dtype, weights: torch.Tensor | None) -> None:
    if size < 1:
        raise ValueError(f"fit_scale: size is {size}, expected at least 1")
    if codebook and codebook not in _CODEBOOKS:
        raise ValueError(f"fit_scale: codebook is {codebook!r}, expected one of {', '.join(_CODEBOOKS)}, or nothing")
    if not codebook and not 2 <= bits <= 8:
        raise ValueError(f"fit_scale: bits is {bits}, expected 2 to 8")
    if dtype not in cpu.DTYPES:
        raise TypeError(f"fit_scale: dtype is {dtype}, expected float32, bfloat16 or float16")
    if weights is not None and (weights.dtype != torch.float32 or weights.dim() != 1 or not len(weights)):
        raise ValueError(
            f"fit_scale: weights are {weights.dtype} {list(weights.shape)}, expected float32 [columns], one column or more"
        )


def _reference(
    x: torch.Tensor, size: int, codebook: str, bits: int, zero_point: bool, dtype: torch.dtype, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(size, codebook, bits, dtype, weights)
    cpu.dtype_code("fit_scale", x)
    flat = x.reshape(-1)
    scale, zero = _fake(x, size, codebook, bits, zero_point, dtype)
    of_columns = None
    # Pieces of whole blocks. On a CPU they are so small that the intermediate values stay in its cache.
    together = max(1, (1 << (16 if x.is_cpu else 24)) // size)
    padded = blocks(size, _LANES) * _LANES
    for first, part in zip(range(0, scale.numel(), together), flat.split(together * size)):
        w = torch.nn.functional.pad(part.float(), (0, -part.numel() % size)).view(-1, size)
        if weights is not None:
            place = torch.arange(first * size, first * size + part.numel(), device=x.device) % len(weights)
            of_columns = torch.nn.functional.pad(weights[place], (0, -part.numel() % size)).view(-1, size)
            of_columns = torch.nn.functional.pad(of_columns, (0, padded - size))
        w = torch.nn.functional.pad(w, (0, padded - size))
        search = _Search(w, codebook, bits, zero_point and not codebook, dtype, of_columns)
        search.run()
        scale[first : first + together] = search.best[1]
        if zero.numel():
            zero[first : first + together] = search.best[2].to(torch.int8)
    return scale, zero


def _fake(x, size, codebook, bits, zero_point, dtype, weights=None):
    count = blocks(x.numel(), size)
    scale = x.new_empty((count,), dtype=torch.float32)
    return scale, x.new_empty((count if zero_point and not codebook else 0,), dtype=torch.int8)


_kernel = cpu.kernel("fit_scale", "piqqppiiifpipipqpp")


def _cpu(
    x: torch.Tensor, size: int, codebook: str, bits: int, zero_point: bool, dtype: torch.dtype, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(size, codebook, bits, dtype, weights)
    if weights is not None:
        weights = cpu.require("fit_scale", "weights", weights, torch.float32, len(weights))
    x, scale_dtype = x.contiguous(), cpu.DTYPES[dtype]
    scale, zero = _fake(x, size, codebook, bits, zero_point, dtype)
    coarse, fine = _factors(codebook, bits, zero_point)
    _kernel(
        x,
        cpu.dtype_code("fit_scale", x),
        x.numel(),
        size,
        *(cpu.address(table) if codebook else None for table in (ranked(codebook) if codebook else (None, None))),
        bits,
        zero_point and not codebook,
        scale_dtype,
        torch.finfo(dtype).eps,
        cpu.address(coarse),
        len(coarse),
        cpu.address(fine),
        _REFITS,
        weights,
        0 if weights is None else len(weights),
        scale,
        zero,
    )
    return scale, zero


_op = define(
    "fit_scale(Tensor x, int size, str codebook, int bits, bool zero_point, ScalarType dtype, "
    "Tensor? weights=None) -> (Tensor, Tensor)",
    _reference,
    _fake,
    _cpu,
)


def fit_scale(
    x: torch.Tensor, size: int, codebook: str, bits: int, zero_point: bool, dtype: torch.dtype, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x of any shape, float32, bfloat16 or float16, is taken in row-major order, in blocks of `size`. The last may be partial.

    codebook is "" for integers of `bits` bits, 2 to 8. With "nf4", "fp4" or "nf3", bits and zero_point are not used. dtype is that
    of the stored scales. weights float32 [columns]: element i of x has weights[i % columns]. Returns scale float32 [ceil(n/size)],
    rounded to dtype, and zero_point int8 [ceil(n/size)], or [0] without zero points. Raises ValueError or TypeError for anything
    else.
    """
    return _op(x, size, codebook, bits, zero_point, dtype, weights)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    forms = [("", bits, zero_point) for bits in (2, 3, 4, 8) for zero_point in (False, True)] + [
        ("nf4", 4, False),
        ("fp4", 4, False),
        ("nf3", 3, False),
    ]
    for codebook, bits, zero_point in forms:
        name = codebook or f"int{bits}" + ("-zero" if zero_point else "")
        options = {"codebook": codebook, "bits": bits, "zero_point": zero_point}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for size, shape in ((64, (8, 96)), (50, (7, 33)), (1024, (2, 1030))):
                x = torch.randn(shape, generator=generator).to(dtype)
                x.view(-1)[::97] *= 5
                yield (
                    f"{name}-{str(dtype)[6:]}-{size}-{'x'.join(map(str, shape))}",
                    {"x": x, "size": size, **options, "dtype": dtype},
                )
        weights = torch.randn(96, generator=generator).square()
        weights[::11] *= 1000
        weights[5] = 0
        for dtype, size, columns in ((torch.bfloat16, 32, 96), (torch.float32, 64, 90), (torch.float32, 1024, 7)):
            x = torch.randn(9, columns, generator=generator).to(dtype)
            yield (
                f"{name}-weighted-{size}-{columns}",
                {"x": x, "size": size, **options, "dtype": dtype, "weights": weights[:columns]},
            )
        hostile = torch.randn(14, 32, generator=generator)
        hostile[0] = 0
        hostile[1:5, 7] = torch.tensor([torch.inf, -torch.inf, -3e38, 3e38])
        hostile[4, 8] = -3e38
        hostile[5:9] *= torch.tensor([[1e-40], [1e-12], [1e12], [7e4]])
        hostile[9] = hostile[9].abs()
        hostile[10] = -hostile[10].abs()
        hostile[11] = 1
        hostile[12, 1:] = 0
        hostile[13] = torch.arange(-16, 16) / 2
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{name}-hostile-{str(dtype)[6:]}", {"x": hostile, "size": 32, **options, "dtype": dtype}
        yield f"{name}-empty", {"x": hostile[:0], "size": 32, **options, "dtype": torch.float32}
        yield f"{name}-one", {"x": hostile[13, :1], "size": 128, **options, "dtype": torch.bfloat16}
