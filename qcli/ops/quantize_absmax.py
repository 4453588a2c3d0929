"""Double quantization (QLoRA, arXiv:2305.14314, section 3): the absmax values of a weight, less their mean, in 8 bits.

y = absmax - offset; groups of 256; code = nearest entry of the dynamic map to y / max|y|, exactly, a tie to the lower one.
This is the rule of bitsandbytes' CUDA kernel; its CPU path rounds y first, to one of 65536 steps, and gives a neighbouring
code for about 0.24% of the values.

The offset is the mean of absmax, in float64, folded: pad with zeros to a power of two, add the upper half to the lower half
until one value is left. Its value does not depend on threads or device, which a reduction's would.
"""

import torch

from qcli import codebooks
from qcli.ops._library import blocks, define

GROUP_SIZE = 256


def mean_absmax(absmax: torch.Tensor) -> float:
    """The offset of absmax float32 [n]: its mean as a float32, in a Python float. 0.0 for no values."""
    if absmax.numel() == 0:
        return 0.0
    size = 1 << (absmax.numel() - 1).bit_length()
    folded = torch.nn.functional.pad(absmax.double(), (0, size - absmax.numel()))
    while size > 1:
        size //= 2
        folded = folded[:size] + folded[size:]
    return (folded / absmax.numel()).float().item()


def _reference(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    count = absmax.numel()
    y = absmax - offset
    groups = torch.nn.functional.pad(y, (0, -count % GROUP_SIZE)).view(-1, GROUP_SIZE)
    nested_absmax = groups.abs().amax(1) if count else y.new_empty(0)
    scaled = groups * (1.0 / nested_absmax).unsqueeze(1)
    # A group of equal values, or of values too small for a reciprocal: their quotient, and zero for 0 / 0.
    small = nested_absmax < 1e-38
    scaled[small] = (groups[small] / nested_absmax[small].unsqueeze(1)).nan_to_num(nan=0.0)
    thresholds = torch.from_numpy(codebooks.DYNAMIC_THRESHOLDS).to(absmax.device)
    codes = torch.bucketize(scaled.view(-1)[:count].double(), thresholds, out_int32=True)
    return codes.to(torch.uint8), nested_absmax


def _fake(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    count = absmax.numel()
    nested = absmax.new_empty((blocks(count, GROUP_SIZE),), dtype=torch.float32)
    return absmax.new_empty((count,), dtype=torch.uint8), nested


_op = define("quantize_absmax(Tensor absmax, float offset) -> (Tensor, Tensor)", _reference, _fake)


def quantize_absmax(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax float32 [n] to codes uint8 [n] and nested_absmax float32 [ceil(n/256)]; `offset` from `mean_absmax`."""
    return _op(absmax, offset)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 255, 256, 1000):
        absmax = torch.rand(count, generator=generator)
        yield str(count), {"absmax": absmax, "offset": mean_absmax(absmax)}
    yield "equal", {"absmax": torch.full((300,), 0.25), "offset": 0.25}
    yield "tiny", {"absmax": torch.full((300,), 1e-39), "offset": 0.0}
    wide = torch.logspace(-6, 2, 512)
    yield "wide", {"absmax": wide, "offset": mean_absmax(wide)}
