"""The error of row-wise int8 quantization: squared error sum (w - q absmax / 127)^2, squared norm sum w^2, and the number of
elements that are NaN or infinite. Such elements are in neither sum. Where the stored value is not finite there is no error.
"""

import torch

from qcli.ops import quantize_int8 as _quantize
from qcli.ops._library import define
from qcli.runtime import cpu


def _reference(x: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    finite = torch.isfinite(rows)
    error = rows - q.reshape(rows.shape).double() * (absmax.double() / 127).unsqueeze(1)
    squares = [torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0).square().sum() for part in (error, rows)]
    return torch.stack((*squares, (finite.numel() - finite.sum()).double()))


def _fake(x: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    return x.new_empty((3,), dtype=torch.float64)


_kernel = cpu.kernel("error_int8", "piqqppp")


def _cpu(x: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    op, rows, columns = "error_int8", absmax.numel(), x.shape[-1]
    if x.numel() != rows * columns:
        raise ValueError(f"{op}: absmax has {rows} elements, expected one for each row of x {tuple(x.shape)}")
    q = cpu.require(op, "q", q, torch.int8, rows * columns)
    absmax = cpu.require(op, "absmax", absmax, torch.float32, rows)
    sums = torch.empty(rows, 3, dtype=torch.float64)
    _kernel(x.contiguous(), cpu.dtype_code(op, x), rows, columns, q, absmax, sums)
    return torch.from_numpy(sums.numpy().sum(0))


_op = define("error_int8(Tensor x, Tensor q, Tensor absmax) -> Tensor", _reference, _fake, _cpu)


def error_int8(x: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """x [..., columns] is the input of quantize_int8, q and absmax [rows] are its results without a threshold.

    Returns sums float64 [3]: squared error, squared norm, non-finite elements.
    """
    return _op(x, q, absmax)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, arguments in _quantize.cases():
        q, absmax, _ = _quantize.quantize_int8(arguments["x"], 0.0)
        yield name, {"x": arguments["x"], "q": q, "absmax": absmax}
