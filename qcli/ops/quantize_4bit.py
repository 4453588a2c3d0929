"""Blockwise 4-bit quantization: absmax per block, and for each element the nearest code of v = x / absmax.

NF4 gives the same bytes as bitsandbytes' CPU path. v is x * (1 / absmax) in full blocks and x / absmax in a last partial block.
A v exactly on a threshold takes the lower code. FP4 follows bitsandbytes' CUDA kernels: the code is chosen for |v|, a tie takes
the smaller magnitude, and the sign bit is set where v < 0. bitsandbytes' CPU path for FP4 differs: it swaps +0 and -0, rounds
negative ties to the larger magnitude, and its midpoints differ from the kernel's literals by up to 4e-7. About 0.6% of the
nibbles differ, nearly all of them between the two zeros.

A block of zeros has absmax 0 and the codes of zero. In a block with 0 < absmax < 1e-38 the reciprocal may overflow, so v is the
quotient x / absmax. (bitsandbytes' CPU path divides by 1e-38 there, and its codes shrink towards zero.)
A block with a NaN or an infinity has it as its absmax, so all its elements decode to NaN or infinity. Callers that cannot accept
this check for such values first. Other blocks are not affected.
"""

import numpy as np
import torch

from qcli import codebooks
from qcli.ops._library import blocks, define
from qcli.packing import pack_4bit
from qcli.runtime import cpu, cuda

_SMALLEST_RECIPROCAL = 1e-38
_CELLS = 1024


def _cell(v):
    """The cell of a v in [-1, 1], before truncation. It ascends with v, and is the same in numpy and torch."""
    return (v + 1) * (_CELLS / 2)


def _search_table(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Per cell: the number of thresholds in lower cells, and the threshold inside the cell (infinity if there is none).

    Two look-ups and one comparison then find the same code as 15 comparisons, in a fifth of the time.
    """
    thresholds = codebooks.THRESHOLDS[quant_type]
    cells = _cell(thresholds).astype(np.int64)
    inside = np.full(_CELLS, np.inf, dtype=np.float32)
    inside[cells] = thresholds
    return np.searchsorted(cells, np.arange(_CELLS)).astype(np.uint8), inside


_TABLES = {quant_type: _search_table(quant_type) for quant_type in codebooks.THRESHOLDS}


def _codes(v: torch.Tensor, quant_type: str) -> torch.Tensor:
    below, inside = (torch.from_numpy(table).to(v.device) for table in _TABLES[quant_type])
    # Rounding may move v beyond 1, and a NaN becomes any integer.
    cells = _cell(v).int().clamp_(0, _CELLS - 1)
    rank = below.index_select(0, cells).add_((v > inside.index_select(0, cells)).view(torch.uint8))
    if quant_type == "nf4":  # its codes ascend with their values
        return rank
    return torch.from_numpy(codebooks.ORDER[quant_type]).to(v.device).index_select(0, rank.int())


def _quantize(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.float()
    full = flat.numel() // block_size * block_size
    rows = flat[:full].view(-1, block_size)
    absmax = rows.abs().amax(1)
    v = rows * (1.0 / absmax.clamp(min=_SMALLEST_RECIPROCAL)).unsqueeze(1)
    tiny = (absmax < _SMALLEST_RECIPROCAL) & (absmax > 0)
    if tiny.any():
        v[tiny] = rows[tiny] / absmax[tiny].unsqueeze(1)
    v = v.view(-1)
    if full < flat.numel():
        rest = flat[full:]
        last = rest.abs().amax()
        absmax = torch.cat((absmax, last.unsqueeze(0)))
        v = torch.cat((v, torch.where(last == 0, rest, rest / last)))
    return pack_4bit(_codes(v, quant_type), codebooks.ZERO_CODE[quant_type]), absmax


def quantize_with(x: torch.Tensor, absmax: torch.Tensor, block_size: int, quant_type: str) -> torch.Tensor:
    """Packed codes uint8 [ceil(n/2), 1] of x, flat, under given scales float32 [ceil(n/block_size)], which need not be the absmax
    of the blocks: a value beyond a scale takes the outermost code."""
    flat = x.reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    v = padded / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    codes = _codes(v.clamp_(-1, 1).view(-1)[: flat.numel()], quant_type)
    return pack_4bit(codes, codebooks.ZERO_CODE[quant_type])


def _reference(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1)
    # Pieces of whole blocks. On a CPU they are so small that the intermediate values stay in its cache.
    piece = block_size * max(1, (1 << (16 if x.is_cpu else 24)) // block_size)
    packed, absmax = zip(*(_quantize(part, block_size, quant_type) for part in flat.split(piece)))
    return torch.cat(packed), torch.cat(absmax)


def _fake(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.numel()
    packed = x.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return packed, x.new_empty((blocks(count, block_size),), dtype=torch.float32)


_kernel = cpu.kernel("quantize_4bit", "piqqppipp")


def _cpu(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    if block_size < 2 or block_size % 2:
        raise ValueError(f"quantize_4bit: block_size is {block_size}, expected an even number")
    x, dtype = x.contiguous(), cpu.dtype_code("quantize_4bit", x)
    packed, absmax = _fake(x, block_size, quant_type)
    thresholds, order = codebooks.THRESHOLDS[quant_type], codebooks.ORDER[quant_type]
    _kernel(
        x,
        dtype,
        x.numel(),
        block_size,
        cpu.address(thresholds),
        cpu.address(order),
        codebooks.ZERO_CODE[quant_type],
        packed,
        absmax,
    )
    return packed, absmax


_kernel_cuda = cuda.kernel("quantize_4bit", "pqitipp")


def _warp_table(quant_type: str) -> bytes:
    """The kernel's table of 32 cells of [-1, 1). Per cell: the threshold in it (infinity if there is none), and the code below the
    threshold plus 16 times the code above it."""
    thresholds, order = codebooks.THRESHOLDS[quant_type], codebooks.ORDER[quant_type]
    inside, codes = np.full(32, np.inf, dtype=np.float32), np.zeros(32, dtype=np.uint32)
    for cell in range(32):
        low, high = np.float32((cell - 16) / 16), np.float32((cell - 15) / 16)
        # A threshold that even the largest v of the cell does not exceed has no effect there.
        (found,) = np.nonzero((thresholds >= low) & (thresholds < np.nextafter(high, np.float32(-1))))
        assert len(found) <= 1
        rank = np.count_nonzero(thresholds < low)
        if len(found):
            inside[cell] = thresholds[found[0]]
        codes[cell] = order[rank] | order[rank + len(found)] << 4
    return inside.tobytes() + codes.tobytes()


_WARP_TABLES = {quant_type: _warp_table(quant_type) for quant_type in codebooks.THRESHOLDS}


def _cuda(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    if block_size < 2 or block_size % 2:
        raise ValueError(f"quantize_4bit: block_size is {block_size}, expected an even number")
    x, dtype = cuda.aligned(x), cuda.type_name("quantize_4bit", x)
    packed, absmax = _fake(x, block_size, quant_type)
    if x.numel():
        warps = max(blocks(x.numel(), 256), absmax.numel() if block_size > 256 else 1)
        grid = min(blocks(warps, 8), 64 * cuda.multiprocessors(x))
        _kernel_cuda(
            (f"DTYPE={dtype}", f"BLOCK_SIZE={block_size}"),
            (grid,),
            256,
            0,
            x,
            x.numel(),
            block_size,
            _WARP_TABLES[quant_type],
            codebooks.ZERO_CODE[quant_type],
            packed,
            absmax,
        )
    return packed, absmax


_op = define("quantize_4bit(Tensor x, int block_size, str quant_type) -> (Tensor, Tensor)", _reference, _fake, _cpu, _cuda)


def quantize_4bit(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes x of any shape, float32, bfloat16 or float16, in row-major order. (QLoRA, arXiv:2305.14314, section 2.)

    block_size is even; quant_type is "nf4" or "fp4". Returns packed uint8 [ceil(n/2), 1] and absmax float32 [ceil(n/block_size)].
    If n is odd, the code of zero follows the last element.
    """
    return _op(x, block_size, quant_type)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for quant_type in codebooks.THRESHOLDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for block_size, shape in ((64, (32, 96)), (32, (7, 5)), (128, (3, 1000)), (4096, (2, 4096)), (64, (0,))):
                x = torch.randn(shape, generator=generator).to(dtype)
                name = f"{quant_type}-{str(dtype)[6:]}-{block_size}-{'x'.join(map(str, shape))}"
                yield name, {"x": x, "block_size": block_size, "quant_type": quant_type}
        hostile = torch.randn(9, 64, generator=generator)
        hostile[0] = 0
        hostile[1] *= 1e-40
        hostile[2, 0] = 3e38
        hostile[3] = torch.from_numpy(codebooks.CODEBOOKS[quant_type]).repeat(4)
        hostile[4] = -0.0
        hostile[5, :15] = torch.from_numpy(codebooks.THRESHOLDS[quant_type])
        hostile[5, 15:30] = -hostile[5, :15]
        hostile[5, 30:] = 1
        hostile[6] = 1e-45
        yield f"{quant_type}-hostile", {"x": hostile, "block_size": 64, "quant_type": quant_type}
        yield f"{quant_type}-one", {"x": hostile[8, :1], "block_size": 64, "quant_type": quant_type}
