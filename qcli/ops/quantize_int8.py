"""Row-wise int8 quantization (LLM.int8(), arXiv:2208.07339, section 2): q = round(x * (127 / absmax)), half to even.

127 / absmax is the rounded reciprocal times 127, as in bitsandbytes' CPU path: a quotient would round some ties the other way.
All values are computed in float32 from the stored dtype, so bfloat16 and float32 values beyond float16's range stay finite.
bitsandbytes casts to float16 first, and gives the same result where float16 represents the values. With a threshold, elements
with |x| >= threshold are outliers: a row's absmax excludes them, and their whole columns are zero in q.

A row of zeros has absmax 0 and q 0. In rows with absmax < 1e-30, 127 / absmax may overflow; they are scaled by 2^100 first, which
is exact. A row with a NaN or an infinity has that as its absmax, and q 0.
"""

import torch

from qcli.ops._library import blocks, define
from qcli.runtime import cpu, cuda


def _reference(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    absmax = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    outliers = torch.zeros(rows.shape[1], dtype=torch.bool, device=x.device)
    if threshold > 0 and len(rows):
        # A maximum of bytes is faster than any().
        outliers = (rows.float().abs() >= threshold).view(torch.uint8).amax(0).bool()
    columns = outliers.nonzero().view(-1)
    # Pieces of whole rows. On a CPU they are so small that the intermediate values stay in its cache.
    piece = max(1, (1 << (16 if x.is_cpu else 24)) // rows.shape[1])
    for start in range(0, len(rows), piece):
        here = slice(start, start + piece)  # with gradients on, the views of a split cannot be written
        kept = rows[here].float()
        magnitude = kept.abs()
        if columns.numel():
            some = magnitude.index_select(1, columns)
            magnitude.index_copy_(1, columns, some.masked_fill_(some >= threshold, 0.0))
            kept = kept.index_fill(1, columns, 0.0)
        absmax[here] = absmax_part = magnitude.amax(1)
        boost = torch.where(absmax_part < 1e-30, 2.0**100, 1.0)
        scale = torch.where(absmax_part > 0, (absmax_part * boost).reciprocal() * 127.0, 0.0)
        scaled = (kept * boost.unsqueeze(1)).mul_(scale.unsqueeze(1))
        q[here] = scaled.round_().nan_to_num_(nan=0.0)
    return q.view(x.shape), absmax, outliers


def _fake(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    absmax = x.new_empty((rows,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), absmax, x.new_empty((x.shape[-1],), dtype=torch.bool)


_kernel = cpu.kernel("quantize_int8", "piqqfppp")


def _cpu(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, dtype, columns = x.contiguous(), cpu.dtype_code("quantize_int8", x), x.shape[-1]
    q = cpu.empty(x.shape, torch.int8)
    absmax = torch.empty(x.shape[:-1].numel(), dtype=torch.float32)
    outliers = torch.zeros(columns, dtype=torch.bool)
    _kernel(x, dtype, absmax.numel(), columns, threshold, q, absmax, outliers)
    return q, absmax, outliers


_find_cuda = cuda.kernel("quantize_int8", "pqifp", "find_outliers")
_kernel_cuda = cuda.kernel("quantize_int8", "pqifppp")


def _cuda(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op, columns = "quantize_int8", x.shape[-1]
    constants = (f"DTYPE={cuda.type_name(op, x)}",)
    x, rows = cuda.aligned(x), x.shape[:-1].numel()
    q, absmax, outliers = _fake(x, threshold)
    outliers.zero_()
    marks = outliers if threshold > 0 else 0
    if x.numel():
        if threshold > 0:
            across = blocks(columns, 256 * 8)
            down = min(rows, max(1, 16 * cuda.multiprocessors(x) // across))
            _find_cuda(constants, (across, down), 256, 0, x, rows, columns, threshold, outliers)
        grid = min(rows, 32 * cuda.multiprocessors(x))
        _kernel_cuda(constants, (grid,), 256, 0, x, rows, columns, threshold, marks, q, absmax)
    return q, absmax, outliers


_op = define("quantize_int8(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)", _reference, _fake, _cpu, _cuda)


def quantize_int8(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., columns], float32, bfloat16 or float16; threshold 0.0 turns outliers off.

    Returns q int8 of x's shape, absmax float32 [rows], and outliers bool [columns].
    """
    return _op(x, threshold)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for threshold in (0.0, 6.0):
            for shape in ((1, 64), (5, 33), (2, 3, 128), (0, 16)):
                x = torch.randn(shape, generator=generator)
                x[..., 3] *= 20
                name = f"{str(dtype)[6:]}-{threshold}-{'x'.join(map(str, shape))}"
                yield name, {"x": x.to(dtype), "threshold": threshold}
    hostile = torch.randn(8, 32, generator=generator)
    hostile[0] = 0
    hostile[1] *= 1e-39
    hostile[2, 0] = 3e38
    hostile[3] = 7.0
    hostile[4] = 1e-45
    hostile[5] = torch.arange(32) * 8 + 4  # they become halves when divided by 2 * 127
    hostile[5, 0] = 254
    for threshold in (0.0, 6.0):
        yield f"hostile-{threshold}", {"x": hostile, "threshold": threshold}
