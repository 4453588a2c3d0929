"""Blockwise 4-bit dequantization: the code's value times the block's absmax, in float32, rounded once to the wanted dtype."""

from math import prod

import torch

from qcli import codebooks
from qcli.ops import quantize_4bit as _quantize
from qcli.ops._library import blocks, define
from qcli.packing import unpack_4bit
from qcli.runtime import cpu, cuda


def _reference(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    count = prod(shape)
    code = torch.from_numpy(codebooks.CODEBOOKS[quant_type]).to(packed.device)
    # One look-up per byte: an entry is the pair of float32 values that the byte stands for.
    both = unpack_4bit(torch.arange(256, dtype=torch.uint8, device=packed.device), 512)
    pairs = code.index_select(0, both.int()).view(torch.int64)
    out = torch.empty(count, dtype=dtype, device=packed.device)
    piece = block_size * max(1, (1 << (16 if packed.is_cpu else 24)) // block_size)
    parts = zip(range(0, count, piece), packed.reshape(-1).split(piece // 2), absmax.split(piece // block_size))
    for start, codes, scales in parts:
        decoded = pairs.index_select(0, codes.int()).view(torch.float32)[: count - start]
        full = decoded.numel() // block_size * block_size
        decoded[:full].view(-1, block_size).mul_(scales[: full // block_size].unsqueeze(1))
        decoded[full:].mul_(scales[full // block_size :])
        out[start : start + piece] = decoded  # with gradients on, the views of a split cannot be written
    return out.view(shape)


def _fake(packed, absmax, block_size, quant_type, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


_kernel = cpu.kernel("dequantize_4bit", "ppqpqqip")


def expand(packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str, start: int, out: torch.Tensor) -> None:
    """Calls the compiled kernel: it fills `out`, contiguous, with the elements of the flat weight from `start` on."""
    op, end = "dequantize_4bit", start + out.numel()
    if block_size < 2 or block_size % 2:
        raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
    packed = cpu.require(op, "packed", packed, torch.uint8, (end + 1) // 2, at_least=True)
    absmax = cpu.require(op, "absmax", absmax, torch.float32, blocks(end, block_size), at_least=True)
    code = cpu.address(codebooks.CODEBOOKS[quant_type])
    _kernel(packed, absmax, block_size, code, start, out.numel(), cpu.dtype_code(op, out), out)


def _cpu(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    out = cpu.empty(shape, dtype)
    expand(packed, absmax, block_size, quant_type, 0, out)
    return out


_kernel_cuda = cuda.kernel("dequantize_4bit", "ppqitp")


def _cuda(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    op, count = "dequantize_4bit", prod(shape)
    if block_size < 2 or block_size % 2:
        raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
    out = packed.new_empty(shape, dtype=dtype)
    packed = cuda.require(op, "packed", packed, torch.uint8, (count + 1) // 2, out.device)
    absmax = cuda.require(op, "absmax", absmax, torch.float32, blocks(count, block_size), out.device)
    if count:
        grid = min(blocks(count, 8 * 256 * 4), 32 * cuda.multiprocessors(out))
        _kernel_cuda(
            (f"DTYPE={cuda.type_name(op, out, 'dtype')}", f"BLOCK_SIZE={block_size}"),
            (grid,),
            256,
            0,
            packed,
            absmax,
            count,
            block_size,
            codebooks.CODEBOOKS[quant_type].tobytes(),
            out,
        )
    return out


_op = define(
    "dequantize_4bit(Tensor packed, Tensor absmax, int block_size, str quant_type, SymInt[] shape, ScalarType dtype) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def dequantize_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """packed uint8 [ceil(n/2), 1], absmax float32 [ceil(n/block_size)], where n is the product of `shape`. Returns a tensor of that
    shape and `dtype`."""
    return _op(packed, absmax, block_size, quant_type, shape, dtype)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, arguments in _quantize.cases():
        x, options = arguments["x"], {k: arguments[k] for k in ("block_size", "quant_type")}
        packed, absmax = _quantize.quantize_4bit(x, **options)
        yield name, {"packed": packed, "absmax": absmax, **options, "shape": list(x.shape), "dtype": x.dtype}
