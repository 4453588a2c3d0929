"""The error of blockwise 4-bit quantization: sums over the weight, and two sums per block for double quantization.

Let c be a code's value, a the absmax, and v = c * a rounded to float32. The sums over the weight are the squared error
sum (w - v)^2, the squared norm sum w^2, and the number of elements that are NaN or infinite. Such elements are in neither sum,
and where v is not finite there is no error. Per block there are the slope sum c (w - v) and the curve sum c^2. With another
absmax a + d the block's squared error becomes sum (w - v)^2 - 2 d slope + d^2 curve.
"""

import torch

from qcli import codebooks
from qcli.ops import quantize_4bit as _quantize
from qcli.ops._library import blocks, define
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.runtime import cpu

_RUN = 64  # blocks per partial sum of the kernel


def _reference(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1)
    # Pieces of whole blocks. On a CPU they are so small that the intermediate values stay in its cache.
    piece = block_size * max(1, (1 << (16 if x.is_cpu else 24)) // block_size)
    parts = zip(flat.split(piece), packed.split(piece // 2), absmax.split(piece // block_size))
    sums, slopes, curves = zip(*(_error(*part, block_size, quant_type) for part in parts))
    return torch.stack(sums).sum(0), torch.cat(slopes), torch.cat(curves)


def _error(x, packed, absmax, block_size, quant_type):
    w = x.float()
    stored = dequantize_4bit(packed, absmax, block_size, quant_type, [w.numel()], torch.float32)
    code = dequantize_4bit(packed, torch.ones_like(absmax), block_size, quant_type, [w.numel()], torch.float32).double()
    finite = torch.isfinite(w)
    error = _finite(w.double() - stored.double())
    squares = torch.stack((error.square().sum(), _finite(w.double()).square().sum()))
    sums = torch.cat((squares, (w.numel() - finite.sum()).double().unsqueeze(0)))
    slope, curve = (_block_sums(part, block_size).bfloat16() for part in (code * error, code * code))
    return sums, slope, curve


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _block_sums(x: torch.Tensor, block_size: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % block_size)).view(-1, block_size).sum(1)


def _fake(x, packed, absmax, block_size, quant_type):
    per_block = [absmax.new_empty(absmax.shape, dtype=torch.bfloat16) for _ in range(2)]
    return x.new_empty((3,), dtype=torch.float64), *per_block


_kernel = cpu.kernel("error_4bit", "piqppqpppp")


def _cpu(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op, count = "error_4bit", x.numel()
    if block_size < 2 or block_size % 2:
        raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
    packed = cpu.require(op, "packed", packed, torch.uint8, (count + 1) // 2)
    absmax = cpu.require(op, "absmax", absmax, torch.float32, blocks(count, block_size))
    _, slope, curve = _fake(x, packed, absmax, block_size, quant_type)
    partial = torch.empty(blocks(absmax.numel(), _RUN), 3, dtype=torch.float64)
    code = cpu.address(codebooks.CODEBOOKS[quant_type])
    _kernel(x.contiguous(), cpu.dtype_code(op, x), count, packed, absmax, block_size, code, partial, slope, curve)
    # numpy adds in order. torch would split the sum among threads, and the result would depend on their number.
    return torch.from_numpy(partial.numpy().sum(0)), slope, curve


_op = define(
    "error_4bit(Tensor x, Tensor packed, Tensor absmax, int block_size, str quant_type) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    _cpu,
)


def error_4bit(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x is the input of quantize_4bit, packed and absmax are its results.

    Returns sums float64 [3] (squared error, squared norm, non-finite elements), slope bfloat16 [blocks], curve bfloat16 [blocks].
    """
    return _op(x, packed, absmax, block_size, quant_type)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, arguments in _quantize.cases():
        packed, absmax = _quantize.quantize_4bit(**arguments)
        options = {key: arguments[key] for key in ("block_size", "quant_type")}
        yield name, {"x": arguments["x"], "packed": packed, "absmax": absmax, **options}
