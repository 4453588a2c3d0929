"""Decodes the absmax values that double quantization stored: map[code] * nested_absmax + offset, in float32."""

import torch

from qcli import codebooks
from qcli.ops import quantize_absmax as _quantize
from qcli.ops._library import blocks, define
from qcli.runtime import cpu, cuda


def _reference(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: float) -> torch.Tensor:
    values = torch.from_numpy(codebooks.DYNAMIC_MAP).to(codes.device).index_select(0, codes.int())
    scale = nested_absmax.repeat_interleave(_quantize.GROUP_SIZE)[: codes.numel()]
    return values * scale + offset


def _fake(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: float) -> torch.Tensor:
    return nested_absmax.new_empty((codes.numel(),))


_kernel = cpu.kernel("dequantize_absmax", "pppfqp")


def _cpu(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: float) -> torch.Tensor:
    op, count = "dequantize_absmax", codes.numel()
    codes = cpu.require(op, "codes", codes, torch.uint8, codes.numel())
    nested_absmax = cpu.require(op, "nested_absmax", nested_absmax, torch.float32, blocks(count, _quantize.GROUP_SIZE))
    absmax = _fake(codes, nested_absmax, offset)
    _kernel(codes, nested_absmax, cpu.address(codebooks.DYNAMIC_MAP), offset, count, absmax)
    return absmax


_kernel_cuda = cuda.kernel("dequantize_absmax", "pppfqp")


def _cuda(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: float) -> torch.Tensor:
    op, count, device = "dequantize_absmax", codes.numel(), codes.device
    codes = cuda.require(op, "codes", codes, torch.uint8, count, device)
    groups = blocks(count, _quantize.GROUP_SIZE)
    nested_absmax = cuda.require(op, "nested_absmax", nested_absmax, torch.float32, groups, device)
    absmax = _fake(codes, nested_absmax, offset)
    if count:
        table = cuda.table(codebooks.DYNAMIC_MAP, device)
        _kernel_cuda((), (groups,), 256, 0, codes, nested_absmax, table, offset, count, absmax)
    return absmax


_op = define("dequantize_absmax(Tensor codes, Tensor nested_absmax, float offset) -> Tensor", _reference, _fake, _cpu, _cuda)


def dequantize_absmax(codes: torch.Tensor, nested_absmax: torch.Tensor, offset: float) -> torch.Tensor:
    """codes uint8 [n], nested_absmax float32 [ceil(n/256)] to absmax float32 [n]."""
    return _op(codes, nested_absmax, offset)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, arguments in _quantize.cases():
        codes, nested_absmax = _quantize.quantize_absmax(**arguments)
        yield name, {"codes": codes, "nested_absmax": nested_absmax, "offset": arguments["offset"]}
