"""Blockwise 4-bit quantization: absmax per block, and for each element the nearest code of v = x / absmax.

NF4 gives the bytes of bitsandbytes' CPU path: v = x * (1 / absmax) in full blocks and x / absmax in a last partial one, a v
exactly on a threshold takes the lower code. FP4 follows bitsandbytes' CUDA kernels: a code is chosen for |v|, a tie takes
the smaller magnitude, and the sign bit is set where x < 0. (Its CPU path rounds negative ties to the larger magnitude and
swaps +0 and -0: about 0.6% of nibbles differ, nearly all of them between two zeros.)

A block of zeros has absmax 0 and the codes of zero. Below an absmax of 1e-38, where a reciprocal may overflow, v is the
quotient. A NaN makes its block's absmax NaN and an infinity makes it infinite: the whole block then decodes to NaN, but for
infinities alone; callers that cannot accept this look for them first.
"""

import torch

from qcli import codebooks
from qcli.ops._library import blocks, define
from qcli.packing import pack_4bit

_SMALLEST_RECIPROCAL = 1e-38


def _codes_nf4(v: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
    for threshold in codebooks.NF4_THRESHOLDS.tolist():
        codes += v > threshold
    return codes


def _codes_fp4(v: torch.Tensor) -> torch.Tensor:
    magnitude = v.abs()
    rank = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
    for threshold in codebooks.FP4_THRESHOLDS.tolist():
        rank += magnitude > threshold
    order = torch.from_numpy(codebooks.FP4_ORDER).to(v.device)
    return order[rank.int()] | ((v < 0).to(torch.uint8) << 3)


_CODES = {"nf4": _codes_nf4, "fp4": _codes_fp4}


def _reference(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1).float()
    full = flat.numel() // block_size * block_size
    rows = flat[:full].view(-1, block_size)
    absmax = rows.abs().amax(1) if full else flat.new_empty(0)
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
    return pack_4bit(_CODES[quant_type](v), codebooks.ZERO_CODE[quant_type]), absmax


def _fake(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.numel()
    packed = x.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return packed, x.new_empty((blocks(count, block_size),), dtype=torch.float32)


_op = define("quantize_4bit(Tensor x, int block_size, str quant_type) -> (Tensor, Tensor)", _reference, _fake)


def quantize_4bit(x: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x of any shape, float32, bfloat16 or float16, taken row-major. quant_type is "nf4" or "fp4".

    Returns packed uint8 [ceil(n/2), 1] and absmax float32 [ceil(n/block_size)]. (QLoRA, arXiv:2305.14314, equation 1-2.)
    """
    return _op(x, block_size, quant_type)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for quant_type in codebooks.CODEBOOKS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for block_size, shape in ((64, (32, 96)), (32, (7, 5)), (128, (3, 1000)), (4096, (2, 4096)), (64, (0,))):
                x = torch.randn(shape, generator=generator).to(dtype)
                name = f"{quant_type}-{str(dtype)[6:]}-{block_size}-{'x'.join(map(str, shape))}"
                yield name, {"x": x, "block_size": block_size, "quant_type": quant_type}
        hostile = torch.randn(8, 64, generator=generator)
        hostile[0] = 0
        hostile[1] = 1e-40
        hostile[2, 0] = 3e38
        hostile[3] = torch.cat([torch.from_numpy(codebooks.NF4)] * 4)
        hostile[4] = -0.0
        yield f"{quant_type}-hostile", {"x": hostile, "block_size": 64, "quant_type": quant_type}
