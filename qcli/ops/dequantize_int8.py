"""Row-wise int8 dequantization: q * (absmax * (1 / 127)), in float32, rounded once to the wanted dtype."""

import torch

from qcli.ops import quantize_int8 as _quantize
from qcli.ops._library import define
from qcli.runtime import cpu, cuda


def _reference(q: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # absmax / 127 comes first: q * absmax could overflow. It is a product because devices differ in dividing by a constant.
    return (q.float() * (absmax.float() * (1 / 127)).unsqueeze(1)).to(dtype)


def _fake(q: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=dtype)


_kernel = cpu.kernel("dequantize_int8", "ppqqip")


def _cpu(q: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    op, (rows, columns) = "dequantize_int8", q.shape
    q = cpu.require(op, "q", q, torch.int8, q.numel())
    absmax = cpu.require(op, "absmax", absmax.float(), torch.float32, rows)
    out = cpu.empty(q.shape, dtype)
    _kernel(q, absmax, rows, columns, cpu.dtype_code(op, out), out)
    return out


_kernel_cuda = cuda.kernel("dequantize_int8", "ppqip")


def _cuda(q: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    op, (rows, columns) = "dequantize_int8", q.shape
    q = cuda.require(op, "q", q, torch.int8, q.numel(), q.device)
    absmax = cuda.require(op, "absmax", absmax.float(), torch.float32, rows, q.device)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel():
        grid = min(rows, 32 * cuda.multiprocessors(q))
        _kernel_cuda((f"DTYPE={cuda.type_name(op, out, 'dtype')}",), (grid,), 256, 0, q, absmax, rows, columns, out)
    return out


_op = define("dequantize_int8(Tensor q, Tensor absmax, ScalarType dtype) -> Tensor", _reference, _fake, _cpu, _cuda)


def dequantize_int8(q: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q int8 [N, K], absmax float32 [N] to [N, K]."""
    return _op(q, absmax, dtype)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, arguments in _quantize.cases():
        x = arguments["x"].reshape(-1, arguments["x"].shape[-1])
        q, absmax, _ = _quantize.quantize_int8(x, 0.0)
        yield name, {"q": q, "absmax": absmax, "dtype": x.dtype}
