"""Statistics of each channel of an activation in one pass, for finding outliers and for choosing a method.

All seven can be merged over batches: the least minimum, the greatest maximum, and sums. Mean, variance, absmax, skewness and
kurtosis follow from them, about zero and about the mean. A channel with a NaN has NaN as minimum, maximum and sums.
"""

import torch

from qcli.ops._library import blocks, define
from qcli.runtime import cpu, cuda

FIELDS = ("min", "max", "sum", "sum_squares", "sum_cubes", "sum_fourths", "count")


def _reference(x: torch.Tensor, threshold: float) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 0:
        stats = torch.zeros(len(FIELDS), rows.shape[1], dtype=torch.float64, device=x.device)
        stats[0], stats[1] = torch.inf, -torch.inf
        return stats
    wide = rows.double()
    squares = wide.square()
    sums = [powers.sum(0) for powers in (wide, squares, squares * wide, squares.square())]
    count = (rows.float().abs() >= threshold).sum(0).double()
    return torch.stack((wide.amin(0), wide.amax(0), *sums, count))


def _fake(x: torch.Tensor, threshold: float) -> torch.Tensor:
    return x.new_empty((len(FIELDS), x.shape[-1]), dtype=torch.float64)


_kernel = cpu.kernel("activation_stats", "piqqfp")


def _cpu(x: torch.Tensor, threshold: float) -> torch.Tensor:
    x, stats = x.contiguous(), _fake(x, threshold)
    rows = x.shape[:-1].numel()
    _kernel(x, cpu.dtype_code("activation_stats", x), rows, x.shape[-1], threshold, stats)
    return stats


_kernel_cuda = cuda.kernel("activation_stats", "pqifqp")
_merge_cuda = cuda.kernel("activation_stats", "piip", "merge_stats")


def _cuda(x: torch.Tensor, threshold: float) -> torch.Tensor:
    x, channels = x.contiguous(), x.shape[-1]
    rows, stats = x.shape[:-1].numel(), _fake(x, threshold)
    if not rows or not channels:
        return _reference(x, threshold)
    constants = (f"DTYPE={cuda.type_name('activation_stats', x)}",)
    across = blocks(channels, 128)
    # Slices have 64 rows or more, and there are enough of them to fill the device.
    slices = min(blocks(rows, 64), max(1, 16 * cuda.multiprocessors(x) // across))
    partial = stats.new_empty((slices, *stats.shape))
    step = blocks(rows, slices)
    _kernel_cuda(constants, (across, slices), 128, 0, x, rows, channels, threshold, step, partial)
    _merge_cuda(constants, (across, len(FIELDS)), 128, 0, partial, slices, channels, stats)
    return stats


_op = define("activation_stats(Tensor x, float threshold) -> Tensor", _reference, _fake, _cpu, _cuda)


def activation_stats(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """x [..., channels], float32, bfloat16 or float16.

    Returns float64 [7, channels], in the order of FIELDS: min, max, sum x, sum x^2, sum x^3, sum x^4, and the number of elements
    with |x| >= threshold.
    """
    return _op(x, threshold)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 64), (7, 33), (2, 3, 200), (0, 16), (600, 5)):
            x = torch.randn(shape, generator=generator) * 3
            x[..., 1] *= 20
            yield f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}", {"x": x.to(dtype), "threshold": 6.0}
    hostile = torch.randn(6, 40, generator=generator)
    hostile[2, 0], hostile[3, 1], hostile[4, 2] = torch.nan, torch.inf, -torch.inf
    hostile[0, 3:6] = torch.tensor([3e38, 1e-45, -0.0])
    hostile[:, 6] = 6.0
    yield "hostile", {"x": hostile, "threshold": 6.0}
