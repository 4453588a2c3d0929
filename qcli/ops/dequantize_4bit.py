"""Blockwise 4-bit dequantization: the code's value times the block's absmax, in float32, rounded once to the wanted dtype. A zero
point is taken from the value first.

The values of some codebooks are kept in eighths (codebooks.UNITS); their absmax is what stands for 8.
"""

from math import prod

import torch

from qcli import codebooks
from qcli.ops import quantize_4bit as _quantize
from qcli.ops._library import blocks, define
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.packing import unpack_4bit
from qcli.runtime import cpu, cuda


def _reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    count = prod(shape)
    if zero_point is not None:
        values = torch.from_numpy(codebooks.CODEBOOKS[quant_type]).to(packed.device)[unpack_4bit(packed, count).int()]
        block = torch.arange(count, device=packed.device) // block_size
        return ((values - zero_point.float()[block] / 8) * absmax[block]).to(dtype).view(shape)
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


def _fake(packed, absmax, block_size, quant_type, shape, dtype, zero_point):
    return packed.new_empty(shape, dtype=dtype)


_kernel = cpu.kernel("dequantize_4bit", "pppqpqqip")


def expand(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    quant_type: str,
    start: int,
    out: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> None:
    """Calls the compiled kernel: it fills `out`, contiguous, with the elements of the flat weight from `start` on."""
    op, end = "dequantize_4bit", start + out.numel()
    if block_size < 2 or block_size % 2:
        raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
    packed = cpu.require(op, "packed", packed, torch.uint8, (end + 1) // 2, at_least=True)
    absmax = cpu.require(op, "absmax", absmax, torch.float32, blocks(end, block_size), at_least=True)
    if zero_point is not None:
        zero_point = cpu.require(op, "zero_point", zero_point, torch.int8, blocks(end, block_size), at_least=True)
    code = cpu.address(codebooks.CODEBOOKS[quant_type])
    _kernel(
        packed, absmax, 0 if zero_point is None else zero_point, block_size, code, start, out.numel(), cpu.dtype_code(op, out), out
    )


def _cpu(packed, absmax, block_size, quant_type, shape, dtype, zero_point):
    out = cpu.empty(shape, dtype)
    expand(packed, absmax, block_size, quant_type, 0, out, zero_point)
    return out


_kernel_cuda = cuda.kernel("dequantize_4bit", "ppqitpp")


def _cuda(packed, absmax, block_size, quant_type, shape, dtype, zero_point=None):
    op, count = "dequantize_4bit", prod(shape)
    if block_size < 2 or block_size % 2:
        raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
    out = packed.new_empty(shape, dtype=dtype)
    packed = cuda.require(op, "packed", packed, torch.uint8, (count + 1) // 2, out.device)
    absmax = cuda.require(op, "absmax", absmax, torch.float32, blocks(count, block_size), out.device)
    if zero_point is not None:
        zero_point = cuda.require(op, "zero_point", zero_point, torch.int8, blocks(count, block_size), out.device)
    if count:
        constants = (f"DTYPE={cuda.type_name(op, out, 'dtype')}", f"BLOCK_SIZE={block_size}")
        grid = min(blocks(count, 8 * 256 * 4), 32 * cuda.multiprocessors(out))
        _kernel_cuda(
            constants if zero_point is None else (*constants, "ZERO=1"),
            (grid,),
            256,
            0,
            packed,
            absmax,
            count,
            block_size,
            codebooks.CODEBOOKS[quant_type].tobytes(),
            0 if zero_point is None else zero_point,
            out,
        )
    return out


_op = define(
    "dequantize_4bit(Tensor packed, Tensor absmax, int block_size, str quant_type, SymInt[] shape, ScalarType dtype, "
    "Tensor? zero_point) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """packed uint8 [ceil(n/2), 1], absmax float32 [ceil(n/block_size)], where n is the product of `shape`; zero_point int8 of as
    many elements, or None. quant_type is a name in codebooks.CODEBOOKS. Returns a tensor of that shape and `dtype`."""
    return _op(packed, absmax, block_size, quant_type, shape, dtype, zero_point)


def decoded_absmax(absmax: torch.Tensor, nested_absmax: torch.Tensor | None, offset: float, quant_type: str) -> torch.Tensor:
    """absmax float32 [blocks] as `dequantize_4bit` takes it, of one in any form that `linear_4bit` takes."""
    if absmax.dtype == torch.uint8:
        return dequantize_absmax(absmax, nested_absmax, offset)
    wide = absmax.float() if nested_absmax is None else absmax.float() / nested_absmax
    unit = codebooks.UNITS[quant_type]
    return wide if unit == 1 else wide * unit


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, arguments in _quantize.cases():
        x, options = arguments["x"], {k: arguments[k] for k in ("block_size", "quant_type")}
        packed, absmax = _quantize.quantize_4bit(x, **options)
        found = {"packed": packed, "absmax": absmax, **options, "shape": list(x.shape), "dtype": x.dtype}
        yield name, found | {"zero_point": None}
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, size, quant_type in (
            ((6, 256), 128, "int4"),
            ((5, 192), 64, "int4"),
            ((7, 96), 16, "e2m1"),
            ((3, 33), 32, "int4"),
        ):
            count = prod(shape)
            zero_point = torch.randint(-8, 8, (blocks(count, size),), generator=generator).to(torch.int8)
            yield (
                f"{str(dtype)[6:]}-{quant_type}-{'x'.join(map(str, shape))}-{size}",
                {
                    "packed": torch.randint(0, 256, ((count + 1) // 2, 1), generator=generator).to(torch.uint8),
                    "absmax": torch.rand(blocks(count, size), generator=generator),
                    "block_size": size,
                    "quant_type": quant_type,
                    "shape": list(shape),
                    "dtype": dtype,
                    "zero_point": zero_point if quant_type == "int4" else None,
                },
            )
